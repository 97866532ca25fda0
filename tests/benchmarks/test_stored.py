import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks import stored
from benchmarks.measuring import quality
from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.evaluation.measure import full_network
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import write_collection

JUDGEMENTS = [("q1", "p2", 1), ("q3", "p5", 1)]


def test_texts_and_stores_are_measured_and_drawn(tiny_layerwise_path, tmp_path, one_thread, capsys):
    data = write_collection(tmp_path / "beir", judgements=JUDGEMENTS)
    output, figure = tmp_path / "stored.json", tmp_path / "stored.svg"
    given = ["--model", tiny_layerwise_path, "--data", data, "--split", "train", "--dtype", "float32"]
    given += ["--store_layers", 2, "--ratios", 1, 4, "--output", output, "--figure", figure]
    given += ["--state_quantization", "int8"]
    stored.main(list(map(str, given)))
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report == json.loads(printed.splitlines()[-1]) and report["queries"] == 2
    rows = [row for row in report["ways"] if row["state_quantization"] is None]
    narrow = [row for row in report["ways"] if row["state_quantization"] == "int8"]
    ways = [(row["store_layer"], row["compress_ratio"], *row["cutoff_layers"]) for row in rows]
    texts = [(0, 1, layer) for layer in (2, 3, 4, 5, 6)] + [(0, 4, layer) for layer in (4, 5, 6)]
    assert ways == texts + [(2, ratio, layer) for ratio in (1, 4) for layer in (3, 4, 5, 6)]
    of = dict(zip(ways, rows, strict=True))
    assert of[0, 1, 6]["share_of_operations"] == of[0, 1, 6]["times_as_fast"] == 1 and of[0, 1, 6]["change"] == 0
    assert of[2, 4, 6]["share_of_operations"] < of[2, 1, 6]["share_of_operations"] < 1
    assert of[0, 4, 6]["bytes_per_passage"] is None
    assert of[2, 4, 6]["bytes_per_passage"] < of[2, 1, 6]["bytes_per_passage"] / 2
    assert stored.table(report["ways"]) in printed
    for row in narrow:
        (layer,) = row["cutoff_layers"]
        wide = of[row["store_layer"], row["compress_ratio"], layer]
        size = 32 + 2  # values, and the scale of a block
        assert row["bytes_per_passage"] == pytest.approx(wide["bytes_per_passage"] * size / (4 * 32), abs=1)
        assert 0 < row["mean_difference"] < row["largest_difference"] < 0.1 and 0.8 < row["tau"] <= 1
        assert row["share_of_operations"] == wide["share_of_operations"]
    assert len(narrow) == sum(layer > 0 for layer, *_ in ways)
    words = {text.text for text in ElementTree.parse(figure).iter() if text.text}
    assert {"nDCG@10", "texts, by exit", "texts, by ratio", "stored after 2 layers, by ratio", "first stage"} <= words


def test_a_way_with_a_store_ranks_as_its_texts(tiny_layerwise_path, tmp_path):
    candidates = from_bm25(read_collection(write_collection(tmp_path, judgements=JUDGEMENTS), "train"), 8)
    reranker = MatryoshkaReranker(tiny_layerwise_path, dtype="float32", devices="cpu", **stored.LENGTHS)
    setting = Setting((6,), (2,), 4, store_layer=2)
    store = reranker.store(candidates.collection.passages, tmp_path / "store", store_layer=2, compress_ratio=4)
    ways = [stored.Way(setting, store), stored.Way(setting), stored.Way(full_network(reranker.config))]
    for query in candidates.passages:
        for way in ways:
            way.rank(reranker, candidates, query)
    from_store, from_texts, full = ways
    assert from_store.rankings == from_texts.rankings
    assert from_store.flops < from_texts.flops < full.flops
    shuffled = replace(full, rankings={query: ids[::-1] for query, ids in full.rankings.items()})
    row = stored.summary(shuffled, full, candidates)
    expected = sum(quality(candidates, shuffled.rankings)) / 2 - sum(quality(candidates, full.rankings)) / 2
    assert row["change"] == pytest.approx(expected, abs=1e-4) and row["share_of_operations"] == 1
