"""Evaluation of a model in training on collections in BEIR's layout, at chosen depths, widths and cascades."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.measure import grid, run_cascade, score_exits, sort_by_width, tokenize
from flagembedding_matryoshka.evaluation.results import slug
from flagembedding_matryoshka.evaluation.runs import CUTOFF, QUALITY, mean, per_query
from flagembedding_matryoshka.inference.device import fast_batch_tokens
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.reranker import MatryoshkaReranker
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import Template

BEIR_METRIC = f"beir_{QUALITY}"
"""Name of the mean over all collections and settings."""
SETTING_KEYS = ("cutoff_layers", "compress_layers", "compress_ratio", "cascade", "store_layer")


class TrainedReranker(MatryoshkaReranker):
    """A re-ranker over a model in memory, for the evaluation's functions.

    Args:
        model: the model, without the adapters' wrapper.
        tokenizer: its tokenizer.
        template: text around query and passage.
        query_max_len, passage_max_len: tokens of a query and of a passage, as in training.
    """

    def __init__(
        self,
        model: CostWiseForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        query_max_len: int,
        passage_max_len: int,
    ) -> None:
        self.model, self.config, self.tokenizer = model, model.config, tokenizer
        self.words, self.temperature = template, template.temperature
        self._pair_tokenizer = PairTokenizer(tokenizer, template)
        self._engine = Engine(model)
        self.target_devices = [str(model.device)]
        self.query_instruction_for_rerank = template.query_instruction
        self.query_instruction_format = template.query_format
        self.passage_instruction_for_rerank = template.passage_instruction
        self.passage_instruction_format = template.passage_format
        self.prompt, self.instruction = template.prompt, None
        self.batch_size = 128
        self.max_tokens_per_batch = fast_batch_tokens(str(model.device), model.dtype, model.config.hidden_size, 1)
        self.query_max_length, self.max_length = query_max_len, query_max_len + passage_max_len
        self.normalize, self.fusion, self.max_layer = False, None, None
        self.cutoff_layers = self.compress_layers = None
        self.compress_ratio, self.store_layer = 1, 0


@dataclass(frozen=True)
class BeirEvaluation:
    """Candidates of collections, and the settings that rank them.

    Attributes:
        candidates: name of each collection to its candidates.
        settings: settings, those of a width as neighbours.
    """

    candidates: Mapping[str, Candidates]
    settings: Sequence[Setting]

    def measure(self, reranker: MatryoshkaReranker) -> dict[str, float]:
        """Return nDCG@10 of each collection and setting, `{collection}_{setting}_nDCG@10`, and the mean of all."""
        found: dict[str, float] = {}
        for name, candidates in self.candidates.items():
            lists = tokenize(reranker, candidates)
            for _, width in groupby(self.settings, key=attrgetter("width")):
                group = list(width)
                exits = [setting for setting in group if not setting.cascade]
                runs = dict(zip(exits, score_exits(reranker, candidates, lists, exits), strict=True)) if exits else {}
                for setting in group:
                    run = runs[setting] if setting in runs else run_cascade(reranker, candidates, lists, setting)[0]
                    quality = per_query(candidates, run, CUTOFF)[QUALITY]
                    found[f"{name}_{slug(setting)}_{QUALITY}"] = mean(quality)
        return {**found, BEIR_METRIC: mean(list(found.values()))}


def read_candidates(directories: Sequence[str], split: str, top_k: int, queries: int | None) -> dict[str, Candidates]:
    """Return BM25's candidates of each collection, by the name of its directory.

    Args:
        directories: collections in BEIR's layout.
        split: the judgements are qrels/{split}.tsv.
        top_k: number of candidates of a query.
        queries: size of a random sample of the judged queries; None is all.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if two directories have the same name, or a collection is malformed.
    """
    names = [Path(directory).resolve().name for directory in directories]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"eval_beir names two directories {repeated[0]}: the log tells them apart by their names.")
    collections = {
        name: read_collection(Path(directory), split) for name, directory in zip(names, directories, strict=True)
    }
    return {
        name: from_bm25(sample_queries(collection, queries, seed=0), top_k) for name, collection in collections.items()
    }


def parse_settings(texts: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """Parse settings in JSON; None, for every exit, stays None.

    Raises:
        ValueError: if a text is not a JSON object with fields of a setting.
    """
    if texts is None:
        return None
    parsed = []
    for text in texts:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"eval_settings: {text!r} is not JSON: {error}") from error
        if not isinstance(values, dict) or set(values) - set(SETTING_KEYS):
            raise ValueError(
                f"eval_settings: {text!r} must be an object with fields of {', '.join(SETTING_KEYS)}, such as "
                '{"cutoff_layers": 9, "compress_layers": [3], "compress_ratio": 2}.'
            )
        if "cascade" in values:
            values["cascade"] = {int(layer): share for layer, share in values["cascade"].items()}
        parsed.append(values)
    return parsed


def resolve_settings(settings: Sequence[Mapping[str, Any]] | None, config: CostWiseConfig) -> list[Setting]:
    """Return the settings of a model; None is every exit at full width.

    Raises:
        TypeError, ValueError: as `Setting.resolve`.
    """
    if settings is None:
        return grid(config)
    return sort_by_width(Setting.resolve(config, **values) for values in settings)
