"""How much of the full ranking survives fewer bits and dropped candidates."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import ir_measures
from ir_measures import nDCG

from benchmarks.scoring.settings import CANDIDATES, TOP, quantizations
from flagembedding_matryoshka import SMOLLM2, MatryoshkaReranker
from flagembedding_matryoshka.mining.retrievers import bm25_lists

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from docstrings import collect_pairs, split


def agreement(queries: int, count: int = CANDIDATES) -> list[dict[str, Any]]:
    """How much of the full ranking of `count` real candidates a query survives, with the shipped re-ranker."""
    pairs = collect_pairs()
    passages, held_out = [pair.passage for pair in pairs], split(pairs).held_out
    found = bm25_lists(passages, [pair.query for pair in held_out], count)
    texts = ([passages[place] for place in places] for places in found)
    # Where the relevant passage is not among the candidates, every order has nDCG 0.
    lists = [(pair, row) for pair, row in zip(held_out, texts, strict=True) if pair.passage in row][:queries]
    options = {"query_max_length": 32, "max_length": 140, "devices": "cpu"}
    ours = MatryoshkaReranker(SMOLLM2, **options)
    first, second = ours.config.exit_layers[:2]
    settings: list[tuple[str, MatryoshkaReranker, dict[int, float] | None]] = [("full depth", ours, None)]
    for method in quantizations(ours):
        settings.append((method, MatryoshkaReranker(SMOLLM2, **options, quantization=method), None))
    cascades = ({first: 0.5}, {first: 0.3, second: 0.1}, {first: 0.1})
    settings += [(f"cascade {cascade}", ours, cascade) for cascade in cascades]

    qrels = [ir_measures.Qrel(str(number), str(row.index(pair.passage)), 1) for number, (pair, row) in enumerate(lists)]
    results: list[dict[str, Any]] = []
    full: list[set[int]] = []
    for name, model, cascade in settings:
        rankings = model.rank_batch([pair.query for pair, _ in lists], [row for _, row in lists], TOP, cascade=cascade)
        run = [
            ir_measures.ScoredDoc(str(number), str(document["corpus_id"]), -float(place))
            for number, ranking in enumerate(rankings)
            for place, document in enumerate(ranking)
        ]
        top = [{document["corpus_id"] for document in ranking} for ranking in rankings]
        full = full or top
        results.append(
            {
                "setting": name,
                "queries": len(lists),
                "nDCG@10": ir_measures.calc_aggregate([nDCG @ 10], qrels, run)[nDCG @ 10],
                "overlap_of_top_10": statistics.mean(len(a & b) / TOP for a, b in zip(top, full, strict=True)),
            }
        )
    return results
