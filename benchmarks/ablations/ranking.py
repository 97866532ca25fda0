"""Rankings of collections by re-rankers, with the functions of the evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.ablations.options import SCORING
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.arguments import collection_name
from flagembedding_matryoshka.evaluation.candidates import Candidates, from_bm25, sample_queries
from flagembedding_matryoshka.evaluation.measure import measure_settings
from flagembedding_matryoshka.evaluation.results import Result, Store, conditions
from flagembedding_matryoshka.evaluation.runs import QUALITY, Run, in_order, per_query
from flagembedding_matryoshka.inference.arguments import given_options
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection

RECALL_AT = 10
Collections = Mapping[str, Candidates]
"""Candidates by the name of their collection."""


class Outcome(NamedTuple):
    """Result and run of a setting on a collection."""

    result: Result
    run: Run


def read_candidates(options: argparse.Namespace) -> dict[str, Candidates]:
    """Return BM25's candidates of every collection."""
    found = {}
    for directory in options.data:
        collection = sample_queries(read_collection(directory, options.split), options.queries, options.query_seed)
        found[collection_name(directory, options.split)] = from_bm25(collection, options.top_k)
    return found


def load(options: argparse.Namespace, model: str, **more: Any) -> MatryoshkaReranker:
    """Load a re-ranker with the dtype and the options of scoring that the command line gives."""
    return MatryoshkaReranker(model, **given_options(options, (*SCORING, "dtype")), **more)


def measure(
    reranker: MatryoshkaReranker,
    collections: Collections,
    settings: Sequence[Setting],
    folder: Path,
    timed_pairs: int = 1,
) -> dict[Setting, dict[str, Outcome]]:
    """Return result and run of every setting on each collection. Results in `folder` are not measured again.

    Args:
        timed_pairs: number of pairs whose time is measured; 1 if speed does not matter.
    """
    found: dict[Setting, dict[str, Outcome]] = {setting: {} for setting in settings}
    for name, candidates in collections.items():
        store = Store(folder / name, conditions(reranker, candidates, timed_pairs, RECALL_AT))
        for result in measure_settings(reranker, candidates, settings, store, timed_pairs, RECALL_AT):
            found[result.setting][name] = Outcome(result, store.run(result.setting))
    return found


def quality(ranked: Mapping[str, Outcome], scope: Sequence[str]) -> list[float]:
    """Return nDCG@10 of each query of the collections in `scope`."""
    return [value for name in scope for value in ranked[name].result.per_query[QUALITY]]


def given_quality(collections: Collections, scope: Sequence[str]) -> list[float]:
    """Return nDCG@10 of each query in the candidates' own order."""
    return [
        value
        for name in scope
        for value in per_query(collections[name], in_order(collections[name].passages), RECALL_AT)[QUALITY]
    ]
