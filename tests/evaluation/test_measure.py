import sys

import pytest

from flagembedding_matryoshka import CostWiseMistralConfig, MatryoshkaReranker
from flagembedding_matryoshka.evaluation.candidates import from_bm25
from flagembedding_matryoshka.evaluation.measure import grid, peak_memory, tokenize
from flagembedding_matryoshka.inference.memory import keep_freed_memory
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.collections import read_collection
from tests.collection import QUERIES
from tests.qwen import qwen_tokenizer, write_causal_lm

CONFIG = CostWiseMistralConfig(num_hidden_layers=6, layer_wise=True, start_layer=2, layer_sep=1)


def test_without_a_wish_every_exit_is_measured():
    assert grid(CONFIG) == [Setting(depth) for depth in (2, 3, 4, 5, 6)]


def test_the_full_network_and_the_full_width_are_always_there():
    assert grid(CONFIG, [4], [3], [2]) == [Setting(4), Setting(6), Setting(4, (3,), 2)]


def test_a_depth_that_a_ratio_does_not_reach_is_left_out():
    settings = grid(CONFIG, [3, 4, 6], [4, 3], [1, 4])
    assert settings == [Setting(3), Setting(4), Setting(6), Setting(4, (3, 4), 4), Setting(6, (3, 4), 4)]


def test_cascades_end_at_the_deepest_asked_for_and_their_exits_are_measured():
    settings = grid(CONFIG, [5], [3], [2], [{4: 0.2, 2: 0.5}])
    stages = ((2, 0.5), (4, 0.2))
    assert settings == [
        *(Setting(depth) for depth in (2, 4, 5, 6)),
        Setting(5, (), 1, stages),
        *(Setting(depth, (3,), 2) for depth in (4, 5)),
        Setting(5, (3,), 2, stages),
    ]


def test_nothing_is_measured_twice():
    settings = grid(CONFIG, [6, 6, 3], [2, 2], [1, 2, 2], [{3: 0.5}, {3: 0.5}])
    assert len(settings) == len(set(settings)) == 6


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"cutoff_layers": [1]}, r"cutoff_layers \[1\] have no head. This model's exits are \[2, 3, 4, 5, 6\]"),
        ({"compress_layers": [9]}, r"compress_layers \[9\] do not exist"),
        ({"compress_layers": [3], "compress_ratios": [3]}, r"compress_ratio is 3, but must be one of \[1, 2, 4, 8\]"),
        ({"compress_ratios": [2]}, r"compress_ratio=2 needs compress_layers"),
        ({"cascades": [{1: 0.5}]}, r"cutoff_layers \[1\] have no head|drops candidates after layer 1"),
        ({"cascades": [{3: 1.5}]}, r"keeps 1.5 of all candidates after layer 3"),
        ({"cutoff_layers": [3], "cascades": [{4: 0.5}]}, r"drops candidates after layer 4, .* one of \[2\]"),
    ],
)
def test_what_the_model_cannot_run_is_refused(wish, message):
    with pytest.raises(ValueError, match=message):
        grid(CONFIG, **wish)


def test_a_query_is_scored_with_its_own_instruction(collection, tmp_path):
    queries = [QUERIES[0], {**QUERIES[2], "instruction": "judge by the topic"}]
    judgements = [("q1", "p2", 1), ("q3", "p6", 1)]
    candidates = from_bm25(read_collection(collection(queries=queries, judgements=judgements), "train"), 6)
    path = write_causal_lm(tmp_path / "model", "qwen3", tokenizer=qwen_tokenizer(), pad_token_id=1)
    template = {"prompt": "Relevant?", "behind": "\n", "instructed": {"behind": ["\n", "Task: {instruction}\n"]}}
    reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu", template=template)
    lists = tokenize(reranker, candidates).inputs
    assert lists.keys() == {"q1", "q3"}
    for query, instruction in (("q1", None), ("q3", "judge by the topic")):
        expected = reranker.tokenize(candidates.pairs([query]), instruction=instruction)
        assert [pair.input_ids.tolist() for pair in lists[query]] == [pair.input_ids.tolist() for pair in expected]
    uninstructed = reranker.tokenize(candidates.pairs(["q3"]))
    assert lists["q3"][0].input_ids.tolist() != uninstructed[0].input_ids.tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark")
def test_what_was_freed_again_counts_once():
    keep_freed_memory()
    size = 256 * 2**20
    nothing, large, again = (peak_memory(lambda size=size: bytearray(b"\x01") * size, ["cpu"]) for size in (1, size, 1))
    assert large == pytest.approx(nothing + size, rel=0.1)
    assert again == pytest.approx(nothing, rel=0.1)


def test_workers_are_processes_of_their_own():
    done = []
    assert peak_memory(lambda: done.append(True), ["cpu", "cpu"]) is None
    assert done
