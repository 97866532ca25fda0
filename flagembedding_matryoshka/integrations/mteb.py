"""MTEB: `mteb.evaluate(MatryoshkaSearch(path, cutoff_layers=16), tasks)`, one object for each setting."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Literal

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
from flagembedding_matryoshka.inference.fusion import ORDER
from flagembedding_matryoshka.inference.options import ranking_weight, resolve_call
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.integrations.adapter import RankingAdapter
from flagembedding_matryoshka.text.templates import Template

logger = logging.getLogger(__name__)

QUERIES_AT_ONCE = 1024
WITHOUT_EFFECT = ("normalize", "show_progress_bar", "return_documents")
THRESHOLDS = ("min_score", "score_threshold")
OF_METADATA = ("meta_fields_to_embed", "embedding_separator", "first_stage_key")
PREDICTIONS = "_predictions.json"
"""End of the names of the files in a `prediction_folder` of mteb. They begin with the task's name."""
TAKEN = ("batch_size", "show_progress_bar")
"""Keys of `encode_kwargs` that are allowed, because mteb itself sets them."""


class MatryoshkaSearch:
    """A re-ranker at one setting, with mteb's search protocol. mteb evaluates it on re-ranking, instruction re-ranking
    and the second stage of retrieval (`task.convert_to_reranking(predictions)`).

    `rank_batch` ranks the lists. mteb measures the scores, or with a cascade the ranks, because scores of different
    exits cannot be compared.

    mteb stores results by name, revision and `experiment_kwargs`. These have everything that scores depend on, so that
    two settings never share a result. `encode_kwargs` are not stored, so only those that mteb sets itself are allowed.
    Its `batch_size` is for encoders and has no effect.

    If the model's template has a place for an instruction, it gets the first of these that exists: the query's own
    instruction, the option `instruction`, the task's prompt. If the template has no such place, mteb appends the
    query's own instruction to the query, and the task's prompt is not used.

    mteb gives a re-ranker its candidates without scores. With fusion, the first stage's scores are read from the folder
    of its predictions, or the order of the candidates replaces them. mteb then measures the fused scores, or with a
    cascade the ranks.

    Args:
        reranker: a re-ranker, or the path of one.
        name: "organisation/model", as mteb lists it; None is the path, or "matryoshka/" and its last component.
        revision: revision of the model; None is the SHA-256 of configuration, weights and tokenizer, which reads all
            weights once.
        first_stage_scores: the `prediction_folder` of the first stage's `mteb.evaluate`; None is no scores. A candidate
            that the first stage did not find gets the lowest score of its query. Needs `fusion`, or a re-ranker with a
            default weight.
        first_stage: "order" uses the order of the candidates, for `task.convert_to_reranking(DIR)`, which sorts them by
            the first stage's scores. Tasks of type re-ranking are refused, because the order of their candidates is not
            that of a first stage. None is no fusion, unless `first_stage_scores` is given.
        options: as in [`~flagembedding_matryoshka.integrations.adapter.RankingAdapter`], except options that do not
            change the order.

    Raises:
        FileNotFoundError: if the folder has no predictions.
        TypeError, ValueError: if the options do not fit the model; if an option has no effect here; if `fusion` is
            given without the first stage's scores or order; or if these are given without a weight.
    """

    def __init__(
        self,
        reranker: MatryoshkaReranker | str,
        name: str | None = None,
        revision: str | None = None,
        first_stage_scores: str | PathLike[str] | None = None,
        first_stage: Literal["order"] | None = None,
        **options: Any,
    ) -> None:
        if given := sorted(set(options) & set(WITHOUT_EFFECT)):
            raise ValueError(f"{given} would not change what mteb measures: leave it out.")
        if given := sorted(set(options) & set(THRESHOLDS)):
            raise ValueError(f"{given} would leave out candidates, which mteb counts as irrelevant: leave it out.")
        if given := sorted(set(options) & set(OF_METADATA)):
            raise ValueError(f"{given} needs texts with metadata, and mteb's texts have none: leave it out.")
        if first_stage not in (None, ORDER):
            raise ValueError(f"first_stage is {first_stage!r}, but must be {ORDER!r} or None.")
        if first_stage_scores is not None and first_stage is not None:
            raise ValueError(f"first_stage_scores and first_stage={first_stage!r}: give one of them.")
        self._first_stage = first_stage
        self._predictions = None if first_stage_scores is None else Predictions(first_stage_scores)
        self._ranking = RankingAdapter(reranker, **options)
        known = None if self._predictions is None else self._predictions.fingerprint()
        self.mteb_model_meta = _model_meta(self._ranking, name, revision, known or first_stage)
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
        """Store the passages for the next `search`, with title and text joined by mteb."""
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
        """Rank the candidates of each query.

        Args:
            queries: texts, with instructions if the task has one for each query.
            top_k: most candidates to return for a query.
            top_ranked: the candidates of each query.

        Returns:
            {query: {passage: score}} of the best `top_k` candidates; empty for a query without candidates.

        Raises:
            ValueError: if there are no candidates, a candidate is not in the corpus, or `encode_kwargs` are given that
                mteb does not set itself.
        """
        if unknown := sorted(set(encode_kwargs) - set(TAKEN)):
            raise ValueError(
                f"encode_kwargs {unknown}: mteb does not store them with its results. Give them to MatryoshkaSearch."
            )
        if top_ranked is None:
            raise ValueError(
                f"{task_metadata.name} has no candidates to re-rank: evaluate a first stage with "
                "prediction_folder=DIR, and then this model on task.convert_to_reranking(DIR)."
            )
        if self._passages is None:
            raise ValueError("search needs the passages: call index first.")
        if self._first_stage is not None and task_metadata.type.endswith("Reranking"):
            raise ValueError(
                f"first_stage={self._first_stage!r}: {task_metadata.name} is a task of type {task_metadata.type}, and "
                "the order of its candidates is not a first stage's. Give first_stage_scores, or leave fusion out."
            )
        reranker, options = self._ranking.load(), dict(self._ranking.options)
        known = None
        if self._predictions is not None:
            known = self._predictions.read(task_metadata.name, hf_subset, hf_split)
        elif self._first_stage is not None:
            options["first_stage"] = self._first_stage
        instructions: dict[str, str | None] = {}
        if _has_place(reranker):
            texts, instructions = _texts_and_instructions(
                queries, task_metadata, num_proc, _instruction_of(reranker, options)
            )
        else:
            texts = dict(_texts(queries, task_metadata, PromptType("query"), num_proc))
        without = [query for query in texts if not top_ranked.get(query)]
        if without:
            logger.warning("%d queries have no candidates and get no results, such as %r", len(without), without[0])
        found: RetrievalOutputType = {query: {} for query in texts}
        show_progress_bar = encode_kwargs.get("show_progress_bar")
        ranked = [query for query in texts if top_ranked.get(query)]
        for start in range(0, len(ranked), QUERIES_AT_ONCE):
            some = ranked[start : start + QUERIES_AT_ONCE]
            names = [list(top_ranked[query]) for query in some]
            if instructions:
                options["instruction"] = [instructions[query] for query in some]
            if known is not None:
                options["first_stage_scores"] = [
                    _scores_of(query, ids, known) for query, ids in zip(some, names, strict=True)
                ]
            rankings = reranker.rank_batch(
                [texts[query] for query in some],
                [[self._passage(query, passage) for passage in ids] for query, ids in zip(some, names, strict=True)],
                **options,
                normalize=False,
                show_progress_bar=show_progress_bar,
            )
            for query, ids, hits in zip(some, names, rankings, strict=True):
                found[query] = {
                    ids[int(hit["corpus_id"])]: -float(rank) if "cutoff_layer" in hit else _score(hit)
                    for rank, hit in enumerate(hits[:top_k], start=1)
                }
        self._passages = None
        return found

    def _passage(self, query: str, passage: str) -> str:
        assert self._passages is not None
        if passage not in self._passages:
            raise ValueError(f"the candidate {passage!r} of query {query!r} is not in the corpus.")
        return self._passages[passage]


class Predictions:
    """Scores in a `prediction_folder` of mteb.

    Args:
        folder: the folder.

    Raises:
        FileNotFoundError: if the folder has no predictions.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self._folder = Path(folder)
        paths = sorted(self._folder.glob(f"*{PREDICTIONS}"))
        if not paths:
            raise FileNotFoundError(
                f"first_stage_scores={str(folder)!r} holds no *{PREDICTIONS}: give the prediction_folder of the first "
                "stage's evaluation."
            )
        self._digests = {path.name: _digest(path) for path in paths}

    def fingerprint(self) -> str:
        """Return the SHA-256 of all files."""
        return hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()

    def read(self, task: str, subset: str, split: str) -> Mapping[str, Mapping[str, float]]:
        """Return the score of each passage of each query.

        Raises:
            ValueError: if there are no scores of this task, subset and split, or the file has changed since the folder
                was first read.
        """
        path = self._folder / f"{task}{PREDICTIONS}"
        if path.name not in self._digests:
            raise ValueError(f"{self._folder} has no scores of task {task}, only {sorted(self._digests)}.")
        if _digest(path) != self._digests[path.name]:
            raise ValueError(
                f"{path} has changed since MatryoshkaSearch was made. Write the re-ranker's predictions to another "
                "folder than the first stage's."
            )
        found = json.loads(path.read_text(encoding="utf-8")).get(subset, {}).get(split)
        if found is None:
            raise ValueError(f"{path} has no scores of subset {subset!r}, split {split!r}.")
        return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _scores_of(query: str, passages: Sequence[str], known: Mapping[str, Mapping[str, float]]) -> list[float | None]:
    """Return the first stage's score of each candidate, None for a candidate that it did not find.

    Raises:
        ValueError: if the first stage found none of the candidates.
    """
    found = known.get(query, {})
    scores = [found.get(passage) for passage in passages]
    if all(score is None for score in scores):
        raise ValueError(
            f"the first stage has no score for any of the {len(passages)} candidates of query {query!r}: another first "
            "stage found them. Give first_stage_scores of the one that did."
        )
    return scores


def _score(hit: Mapping[str, Any]) -> float:
    """Return the score that orders a list without a cascade."""
    return float(hit.get("fused_score", hit["score"]))


def _texts(
    rows: CorpusDatasetType | QueryDatasetType, task_metadata: TaskMetadata, kind: PromptType, num_proc: int | None
) -> Iterator[tuple[str, str]]:
    """Yield id and text of each row, as mteb gives them to a cross-encoder."""
    for batch in create_dataloader(rows, task_metadata=task_metadata, prompt_type=kind, num_proc=num_proc):
        yield from zip(batch["id"], batch["text"], strict=True)


def _has_place(reranker: MatryoshkaReranker) -> bool:
    """Return whether the model's template has a place for an instruction."""
    return Template.load(reranker.config.template).instructed is not None


def _instruction_of(reranker: MatryoshkaReranker, options: Mapping[str, Any]) -> str | None:
    """Return the caller's instruction, not the checkpoint's own."""
    return reranker.instruction if options.get("instruction") is None else options["instruction"]


def _texts_and_instructions(
    queries: QueryDatasetType, task_metadata: TaskMetadata, num_proc: int | None, given: str | None
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the text and the instruction of each query.

    Args:
        given: the caller's instruction, for queries without one; None is the task's prompt.
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


def _model_meta(ranking: RankingAdapter, name: str | None, revision: str | None, first_stage: str | None) -> ModelMeta:
    """Return mteb's metadata, with the setting, lengths and changed words of the template in `experiment_kwargs`.

    Args:
        first_stage: "order", or the fingerprint of the first stage's scores; None without fusion.

    Raises:
        TypeError, ValueError: as `MatryoshkaReranker.rank` with these options.
    """
    reranker, options = ranking.load(), dict(ranking.options)
    has_first_stage = first_stage is not None
    of_first_stage: dict[str, Any] = {"first_stage": ORDER} if has_first_stage else {}
    reranker.rank("", [], **of_first_stage, **options)
    cascade = options.pop("cascade", None)
    chosen, setting = resolve_call(reranker, options, cascade, is_ranking=True)
    weight = ranking_weight(chosen, {"fusion": ranking.given.get("fusion")}, has_first_stage)
    fused = {} if weight is None else {"fusion": weight, "first_stage": first_stage}
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
            **fused,
        },
    )
