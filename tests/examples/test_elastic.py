import json

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from examples import elastic
from flagembedding_matryoshka import MatryoshkaReranker
from tests.collection import WORDS, write_collection


def test_losses_are_those_of_the_deepest_exit_and_of_half_depth():
    rows = elastic.compare({30: [0.5, 0.75, 1.0]}, {8: [0.5, 0.5, 0.5], 15: [0.25, 0.75, 1.0], 30: [0.5, 0.75, 0.875]})
    assert [row["exit"] for row in rows] == [30, 8, 15, 30] and rows[0]["nDCG@10"] == 0.75
    deepest, half = elastic.losses(rows)
    assert deepest == pytest.approx(0.125 / 3) and half == pytest.approx((0.25 - 0.125) / 3)
    low, high = rows[2]["interval"]
    assert low <= -half <= high


@pytest.mark.slow
def test_a_plain_reranker_becomes_elastic(tmp_path, tiny_tokenizer, capsys):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    base, data, output = tmp_path / "base", tmp_path / "data", tmp_path / "out"
    MistralForCausalLM(MistralConfig(vocab_size=len(tiny_tokenizer), num_hidden_layers=10, **shape)).save_pretrained(
        base
    )
    tiny_tokenizer.save_pretrained(base)
    topics, others = WORDS[:6], WORDS[6:]
    corpus = [{"_id": f"{topic}-{other}", "text": f"{topic} {other}"} for topic in topics for other in others]
    queries = [{"_id": topic, "text": f"what is {topic}"} for topic in topics]
    for split, some in (("train", topics[:4]), ("test", topics[4:])):
        write_collection(data, corpus, queries, [(topic, f"{topic}-{others[0]}", 1) for topic in some], split=split)
    words = ["--base", base, "--data", data, "--output", output, "--exits", 5, 10, "--steps", 2, 2, "--use_cpu", "True"]
    elastic.main([*map(str, words), "--train_group_size", "3", "--dtype", "float32"])
    rows = json.loads((output / "comparison.json").read_text())
    assert [(row["model"], row["exit"]) for row in rows] == [("plain", 10), ("elastic", 5), ("elastic", 10)]
    assert "deepest exit: loss" in capsys.readouterr().out
    # The plain one has no other exit, and both learn from training queries alone.
    assert MatryoshkaReranker(output / "plain", devices="cpu").config.exit_layers == [10]
    for name in ("rows.jsonl", "lists.jsonl"):
        asked = {json.loads(line)["query"] for line in (output / name).open()}
        assert asked == {f"what is {topic}" for topic in topics[:4]}
    before = (output / "elastic" / "config.json").stat().st_mtime_ns
    elastic.main([*map(str, words), "--dtype", "float32"])
    assert (output / "elastic" / "config.json").stat().st_mtime_ns == before
