"""MTEB: `mteb.evaluate(MatryoshkaSearch(path, cutoff_layers=16), tasks)`, one object for each setting."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from mteb._create_dataloaders import create_dataloader
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.types import (
    CorpusDatasetType,
    EncodeKwargs,
    PromptType,
    QueryDatasetType,
    RetrievalOutputType,
    TopRankedDocumentsType,
)

from flagembedding_matryoshka.inference.fingerprint import model_fingerprint
from flagembedding_matryoshka.inference.options import resolve_ranking
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.ranking import Ranking
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)

QUERIES_AT_ONCE = 1024
WITHOUT_EFFECT = ("normalize", "show_progress_bar", "return_documents")
THRESHOLDS = ("min_score", "score_threshold")
TAKEN = ("batch_size", "show_progress_bar")
"""What may be among `encode_kwargs`: mteb itself sets both."""


class MatryoshkaSearch:
    """A re-ranker at one setting, by mteb's search protocol: re-ranking, instruction re-ranking and the second stage of
    retrieval (`task.convert_to_reranking(predictions)`).

    Whole lists are ranked in common batches, by `rank_batch`. A result is mteb's own measure of that order: without a
    cascade of the scores, with one of the ranks, because scores of different exits do not say which is better.

    mteb keeps results by name, revision and `experiment_kwargs`; all that scores depend on is in one of them, so that
    no setting finds another's. `encode_kwargs` are not, and only mteb's own are taken; its `batch_size` is for
    encoders: pairs are put together as the re-ranker says.

    If the model's template has a place for an instruction, a query's own instruction stands there; of queries without
    one the option `instruction`, or else the task's prompt. If it has none, a query's own instruction stands behind the
    query, as mteb puts it, and a task's prompt is not used.

    Args:
        reranker: or the path of one.
        name: "organisation/model", as mteb lists it; None is the path, or "matryoshka/" and its last part.
        revision: None is the SHA-256 of configuration, weights and tokenizer, which reads all weights once.
        options: as in [`~flagembedding_matryoshka.integrations.ranking.Ranking`], but for what changes no order.

    Raises:
        TypeError, ValueError: if the options do not fit the model, or one has no effect here.
    """

    def __init__(
        self,
        reranker: MatryoshkaReranker | str,
        name: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        if given := sorted(set(options) & set(WITHOUT_EFFECT)):
            raise ValueError(f"{given} would change nothing that mteb measures; leave it out.")
        if given := sorted(set(options) & set(THRESHOLDS)):
            raise ValueError(f"{given} would leave out candidates, which mteb then takes for irrelevant.")
        self._ranking = Ranking(reranker, **options)
        self._ranking.check()
        self.mteb_model_meta = _model_meta(self._ranking, name, revision)
        self._passages: dict[str, str] | None = None

    def index(
        self,
        corpus: CorpusDatasetType,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: EncodeKwargs,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the passages for the next `search`, title and text of each as mteb puts them together."""
        self._passages = dict(_texts(corpus, task_metadata, PromptType("document"), num_proc))

    def search(
        self,
        queries: QueryDatasetType,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: EncodeKwargs,
        top_ranked: TopRankedDocumentsType | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """The best `top_k` of each query's candidates, {query: {passage: score}}; a query without any has none.

        Args:
            queries: text, and the instruction of tasks that have one for each query.
            top_ranked: the candidates.

        Raises:
            ValueError: if there are no candidates, or one is not in the corpus, or on any `encode_kwargs` but mteb's.
        """
        if unknown := sorted(set(encode_kwargs) - set(TAKEN)):
            raise ValueError(
                f"encode_kwargs {unknown}: mteb would keep the results under the same name; give them to "
                "MatryoshkaSearch."
            )
        if top_ranked is None:
            raise ValueError(
                f"{task_metadata.name} has no candidates, and a re-ranker finds none: evaluate a first stage with "
                "prediction_folder=DIR, and then this on task.convert_to_reranking(DIR)."
            )
        if self._passages is None:
            raise ValueError("search comes after index, which has the passages.")
        reranker, options = self._ranking.load(), dict(self._ranking.options)
        instructions: dict[str, str | None] = {}
        if _has_place(reranker):
            texts, instructions = _apart(queries, task_metadata, num_proc, _instruction_of(reranker, options))
        else:
            texts = dict(_texts(queries, task_metadata, PromptType("query"), num_proc))
        without = [query for query in texts if not top_ranked.get(query)]
        if without:
            logger.warning("%d queries have no candidates and find nothing, such as %r", len(without), without[0])
        found: RetrievalOutputType = {query: {} for query in texts}
        show_progress_bar = encode_kwargs.get("show_progress_bar")
        ranked = [query for query in texts if top_ranked.get(query)]
        for start in range(0, len(ranked), QUERIES_AT_ONCE):
            some = ranked[start : start + QUERIES_AT_ONCE]
            names = [list(top_ranked[query]) for query in some]
            if instructions:
                options["instruction"] = [instructions[query] for query in some]
            rankings = reranker.rank_batch(
                [texts[query] for query in some],
                [[self._passage(query, passage) for passage in ids] for query, ids in zip(some, names, strict=True)],
                **options,
                normalize=False,
                show_progress_bar=show_progress_bar,
            )
            for query, ids, hits in zip(some, names, rankings, strict=True):
                found[query] = {
                    ids[int(hit["corpus_id"])]: -float(rank) if "cutoff_layer" in hit else float(hit["score"])
                    for rank, hit in enumerate(hits[:top_k], start=1)
                }
        self._passages = None
        return found

    def _passage(self, query: str, passage: str) -> str:
        assert self._passages is not None
        if passage not in self._passages:
            raise ValueError(f"the candidate {passage!r} of query {query!r} is not in the corpus.")
        return self._passages[passage]


def _texts(
    rows: CorpusDatasetType | QueryDatasetType, task_metadata: TaskMetadata, kind: PromptType, num_proc: int | None
) -> Iterator[tuple[str, str]]:
    """Id and text of each row, as mteb gives them to a cross-encoder."""
    for batch in create_dataloader(rows, task_metadata=task_metadata, prompt_type=kind, num_proc=num_proc):
        yield from zip(batch["id"], batch["text"], strict=True)


def _has_place(reranker: MatryoshkaReranker) -> bool:
    """Whether the model's template has a place for an instruction."""
    return Template.load(reranker.config.template).instructed is not None


def _instruction_of(reranker: MatryoshkaReranker, options: Mapping[str, Any]) -> str | None:
    """The instruction that the caller gave, not the checkpoint's own."""
    return reranker.instruction if options.get("instruction") is None else options["instruction"]


def _apart(
    queries: QueryDatasetType, task_metadata: TaskMetadata, num_proc: int | None, given: str | None
) -> tuple[dict[str, str], dict[str, str | None]]:
    """The text and the instruction of each query.

    Args:
        given: the caller's instruction, of queries without one; None is the task's prompt.
    """
    prompt = task_metadata.prompt
    of_task: Any = prompt.get("query") if isinstance(prompt, dict) else prompt
    texts: dict[str, str] = {}
    instructions: dict[str, str | None] = {}
    loader = create_dataloader(queries, task_metadata=task_metadata, prompt_type=PromptType("query"), num_proc=num_proc)
    for batch in loader:
        own = batch.get("instruction") or [None] * len(batch["id"])
        for query, text, instruction in zip(batch["id"], batch["query"], own, strict=True):
            texts[query] = text
            instructions[query] = instruction or (of_task if given is None else given)
    return texts, instructions


def _model_meta(ranking: Ranking, name: str | None, revision: str | None) -> ModelMeta:
    """Under `experiment_kwargs` the setting, lengths, and words that are not the checkpoint's own."""
    reranker, options = ranking.load(), dict(ranking.options)
    cascade = options.pop("cascade", None)
    chosen, setting = resolve_ranking(reranker, options, cascade)
    own = asdict(Template.load(reranker.config.template))
    given = _instruction_of(reranker, options)
    instructed = {"instruction": "the task's" if given is None else given} if _has_place(reranker) else {}
    words = {
        "query_instruction": chosen.query_instruction_for_rerank,
        "query_format": chosen.query_instruction_format,
        "passage_instruction": chosen.passage_instruction_for_rerank,
        "passage_format": chosen.passage_instruction_format,
        "prompt": chosen.prompt,
    }
    path = PurePath(reranker.model_name_or_path)
    if name is None:
        name = "/".join(path.parts) if len(path.parts) == 2 and not path.is_absolute() else f"matryoshka/{path.name}"
    return ModelMeta(
        loader=None,
        name=name,
        revision=revision or model_fingerprint(reranker),
        release_date=None,
        languages=None,
        n_parameters=reranker.model.num_parameters() if reranker.quantization is None else None,
        memory_usage_mb=None,
        max_tokens=chosen.max_length,
        embed_dim=None,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"],
        similarity_fn_name=None,
        use_instructions=True,
        training_datasets=None,
        model_type=["cross-encoder"],
        experiment_kwargs={
            **{name: value for name, value in setting.to_json().items() if value not in ((), 1)},
            "query_max_length": chosen.query_max_length,
            "max_length": chosen.max_length,
            **{name: text for name, text in words.items() if text != own[name]},
            **instructed,
        },
    )
