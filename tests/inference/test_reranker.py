import copy
import gc
import math
import pickle
import re
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import psutil
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import scoring
from flagembedding_matryoshka.inference.inputs import as_pairs
from flagembedding_matryoshka.inference.memory import TokenLimit
from flagembedding_matryoshka.text.pairs import count_tokens
from tests.batches import out_of_memory_above
from tests.tiny_base import TINY_BASE

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [
    ("how does a wing lift", "air flows faster over the upper side of a wing."),
    ("how does a wing lift", ""),
    ("Yes", "a"),
    ("what is a heat flux?", "the flow of energy per unit of area and time. " * 40),
]
WIDTHS = [{}, {"compress_layers": [2], "compress_ratio": 2}, {"compress_layers": [2, 4], "compress_ratio": 8}]


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=tolerance, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pair_scores_the_same_alone_in_a_batch_and_in_any_order(reranker, width):
    together = reranker.compute_score(PAIRS, cutoff_layers=[3, 6], **width)
    alone = [reranker.compute_score(pair, cutoff_layers=[3, 6], **width) for pair in PAIRS]
    backwards = reranker.compute_score(PAIRS[::-1], cutoff_layers=[3, 6], batch_size=2, **width)
    close(together, [[scores[exit_][0] for scores in alone] for exit_ in range(2)])
    close(together, [scores[::-1] for scores in backwards])


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=300)), min_size=2, max_size=5), st.randoms())
@settings(max_examples=20, deadline=None)
def test_any_text_scores_the_same_in_any_order(reranker, pairs, random):
    shuffled = random.sample(range(len(pairs)), len(pairs))
    scores = reranker.compute_score(pairs, compress_layers=3, compress_ratio=2)
    assert all(map(math.isfinite, scores))
    close(
        reranker.compute_score([pairs[index] for index in shuffled], compress_layers=3, compress_ratio=2),
        [scores[index] for index in shuffled],
    )


def test_shapes(reranker):
    assert [type(score) for score in reranker.compute_score(PAIRS)] == [float] * 4
    assert len(reranker.compute_score(PAIRS[0])) == 1
    assert len(reranker.compute_score(list(PAIRS[0]))) == 1
    assert reranker.compute_score([]) == []
    assert [len(scores) for scores in reranker.compute_score(PAIRS, cutoff_layers=[6, 2, 4])] == [4, 4, 4]


def test_layers_come_in_the_order_asked_for(reranker):
    by_layer = {layer: reranker.compute_score(PAIRS, cutoff_layers=layer) for layer in range(2, 7)}
    close(reranker.compute_score(PAIRS, cutoff_layers=[6, 2, 4]), [by_layer[layer] for layer in (6, 2, 4)])
    close(reranker.compute_score(PAIRS), by_layer[6])


def test_a_call_overrides_each_default_and_leaves_it(tiny_layerwise_path, reranker):
    changes = {
        "cutoff_layers": [4],
        "compress_layers": [2],
        "compress_ratio": 4,
        "prompt": "Yes?",
        "query_max_length": 3,
        "max_length": 20,
        "normalize": True,
        "query_instruction_for_rerank": "query: ",
        "passage_instruction_format": "{}<{}>",
    }
    before = reranker.compute_score(PAIRS)
    overridden = reranker.compute_score(PAIRS, batch_size=1, **changes)
    constructed = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", batch_size=2, **changes)
    close(overridden, constructed.compute_score(PAIRS))
    assert not torch.allclose(torch.tensor(overridden), torch.tensor(before))
    assert reranker.compute_score(PAIRS) == before
    close(reranker.compute_score(PAIRS, compress_layer=2, compress_ratio=2), reranker.compute_score(PAIRS, **WIDTHS[1]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda reranker: pickle.loads(pickle.dumps(reranker))])
def test_a_copy_scores_with_the_arguments_and_the_current_defaults(tiny_layerwise_path, copied):
    reranker = MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64, prompt="Yes?"
    )
    reranker.cutoff_layers = [4]
    found = copied(reranker)
    assert found.compute_score(PAIRS) == reranker.compute_score(PAIRS)
    assert found.model is not reranker.model


def test_a_pickle_does_not_hold_the_hubs_token(tiny_layerwise_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", token="hf_secret")
    pickled = pickle.dumps(reranker)
    assert b"hf_secret" not in pickled and b"dtype" in pickled
    assert pickle.loads(pickled).compute_score(PAIRS[:2]) == reranker.compute_score(PAIRS[:2])
    public = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", token=False)
    assert pickle.loads(pickle.dumps(public))._arguments["token"] is False


AT_EXIT = """
import builtins, sys
from flagembedding_matryoshka import MatryoshkaReranker
builtins.held = reranker = MatryoshkaReranker(sys.argv[1], dtype="float32", devices="cpu")
reranker.stop_self_pool = lambda: 1 / 0
"""


@pytest.mark.slow
def test_nothing_is_ended_when_the_interpreter_ends(tiny_layerwise_path):
    """Modules are gone then, and a method that needs them prints an error."""
    command = [sys.executable, "-c", AT_EXIT, str(tiny_layerwise_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": []}, "devices is an empty list, but must name at least one device"),
        ({"devices": "gpu"}, "devices has 'gpu', but must have names such as 'cpu'"),
        ({"devices": ["cpu", "cuda:99"]}, r"devices has 'cuda:99', but torch finds \d+ CUDA devices on this machine"),
        ({"devices": 99}, r"devices has 'cuda:99', but torch finds \d+ CUDA devices"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn', but must be 'auto', 'float32'"),
        ({"max_length": 513}, "max_length is 513, but must be at most the model's max_position_embeddings=512"),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_read(tiny_layerwise_path, monkeypatch, options, message):
    monkeypatch.setattr("flagembedding_matryoshka.inference.reranker.load_model", lambda *a, **b: pytest.fail("read"))
    with pytest.raises(ValueError, match=message):
        MatryoshkaReranker(str(tiny_layerwise_path), **({"devices": "cpu"} | options))


def test_what_is_too_long_for_the_model_is_refused_before_the_first_pair(reranker, monkeypatch):
    monkeypatch.setattr(reranker._engine, "start", lambda *given: pytest.fail("a pair was computed"))
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_FIRST", 2)
    pairs = [*PAIRS[:3], PAIRS[2], ("Yes", "air " * 600)]
    for call in (reranker.compute_score, lambda pairs, **options: reranker.rank("a wing", ["air"], **options)):
        with pytest.raises(ValueError, match="max_length is 4096, but must be at most"):
            call(pairs, max_length=4096)
    inputs = reranker.tokenize(pairs, max_length=600)
    for call, values in ((reranker.compute_score, inputs), (reranker.score_lists, [inputs[:2], inputs[2:]])):
        with pytest.raises(ValueError, match=r"pair 4 has \d+ tokens, .* and the model has 512 positions"):
            call(values)


def test_a_pair_that_the_words_make_too_long_is_named(reranker, monkeypatch):
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_FIRST", 2)
    with pytest.raises(ValueError, match=r"pair 4 has \d+ tokens, .* and the model has 512 positions"):
        reranker.compute_score([*PAIRS[:3], PAIRS[2], ("Yes", "air " * 600)], max_length=512)


def test_no_instruction_given_is_the_one_of_training_and_an_empty_one_is_none(tiny_layerwise_path, reranker):
    names = ("query_instruction_for_rerank", "passage_instruction_for_rerank")
    options = {"dtype": "float32", "devices": "cpu", "max_length": reranker.max_length}
    as_flagembedding = MatryoshkaReranker(str(tiny_layerwise_path), use_fp16=True, **options, **dict.fromkeys(names))
    assert as_flagembedding.compute_score(PAIRS) == reranker.compute_score(PAIRS)
    bare = MatryoshkaReranker(str(tiny_layerwise_path), **options, **dict.fromkeys(names, ""))
    spelled = [(f"A: {query}", f"B: {passage}") for query, passage in PAIRS]
    close(bare.compute_score(spelled), reranker.compute_score(PAIRS))


def test_normalize_gives_sigmoids(reranker):
    scores = torch.tensor(reranker.compute_score(PAIRS))
    close(reranker.compute_score(PAIRS, normalize=True), scores.sigmoid().tolist(), 1e-7)


def test_rank_orders_by_score(reranker):
    query, documents = PAIRS[0][0], [passage for _, passage in PAIRS]
    scores = reranker.compute_score([(query, document) for document in documents], cutoff_layers=3)
    ranked = reranker.rank(query, documents, cutoff_layers=3, return_documents=True)
    assert [hit["corpus_id"] for hit in ranked] == sorted(range(4), key=lambda index: -scores[index])
    for hit in ranked:
        assert hit["text"] == documents[hit["corpus_id"]]
        assert hit["score"] == pytest.approx(scores[hit["corpus_id"]], abs=1e-6)
    top = reranker.rank(query, documents, top_k=2, cutoff_layers=[3])
    assert top == [{name: value for name, value in hit.items() if name != "text"} for hit in ranked[:2]]
    assert reranker.rank(query, []) == []
    with pytest.raises(ValueError, match="top_k is 0"):
        reranker.rank(query, documents, top_k=0)
    with pytest.raises(ValueError, match=r"cutoff_layers=\[2, 3\]"):
        reranker.rank(query, documents, cutoff_layers=[2, 3])
    with pytest.raises(TypeError, match="documents of query 0 must be a list, got the string"):
        reranker.rank(query, "a document")


def test_flops_fall_with_depth_and_width_and_add_up(reranker):
    full = reranker.estimate_flops(PAIRS[1:])
    assert full == sum(reranker.estimate_flops(pair) for pair in PAIRS[1:])
    assert reranker.estimate_flops(PAIRS[1:], cutoff_layers=[3]) < full
    assert reranker.estimate_flops(PAIRS[1:], compress_layers=[2], compress_ratio=2) < full
    assert reranker.estimate_flops([]) == 0


def test_tokens_of_a_query_and_of_each_document(reranker):
    query, documents = PAIRS[0][0], [passage for _, passage in PAIRS]
    shared, tokens = reranker.count_tokens(query, documents)
    pairs = [(query, document) for document in documents]
    inputs = reranker.tokenize(pairs)
    lengths = [len(pair) for pair in inputs]
    assert reranker.count_tokens(query, iter(documents)) == (shared, tokens)
    with pytest.raises(TypeError, match="documents of query 0 must be a list, got the dict"):
        reranker.count_tokens(query, dict.fromkeys(documents))
    assert [shared + count for count in tokens] == lengths
    assert tokens[1] == min(tokens) > 0
    assert sum(reranker.count_tokens(query, documents, max_length=1000)[1]) > sum(tokens)
    assert reranker.count_tokens(query, []) == (0, [])
    with pytest.raises(TypeError, match="document 0 of query 0 must be a string, got 3"):
        reranker.count_tokens(query, [3])


def test_progress_bar_on_long_work_only(reranker, monkeypatch, capsys):
    reranker.compute_score(PAIRS)
    assert capsys.readouterr().err == ""
    reranker.compute_score(PAIRS, batch_size=2, show_progress_bar=True)
    assert "4/4" in capsys.readouterr().err
    start = reranker._engine.start
    monkeypatch.setattr(reranker._engine, "start", lambda *given: time.sleep(0.7) or start(*given))
    reranker.compute_score(PAIRS, batch_size=2)
    assert "4/4" in capsys.readouterr().err
    reranker.compute_score(PAIRS, batch_size=2, show_progress_bar=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pairs_that_fit", [1, 2])
def test_out_of_memory_halves_the_batch_down_to_one_pair(reranker, pairs_that_fit, monkeypatch, caplog):
    expected = reranker.compute_score(PAIRS)
    calls = []
    model = reranker.model.model
    limited = out_of_memory_above(model, pairs_that_fit)
    monkeypatch.setattr(reranker._engine, "_limit", TokenLimit())
    monkeypatch.setattr(model, "embed", lambda *batch: calls.append(batch) or limited(*batch))
    close(reranker.compute_score(PAIRS), expected)
    assert re.search(r"Out of memory with \d+ tokens in a batch; for now at most \d+", caplog.text)
    calls.clear()
    close(reranker.compute_score(PAIRS), expected)
    assert all(len(batch[1].sequences) <= pairs_that_fit for batch in calls), "it does not run out of memory again"


def test_out_of_memory_on_one_pair_says_which(reranker, monkeypatch):
    monkeypatch.setattr(reranker._engine, "_limit", TokenLimit())
    monkeypatch.setattr(reranker.model.model, "embed", out_of_memory_above(reranker.model.model, 0))
    with pytest.raises(torch.OutOfMemoryError, match=r"pair 3, of \d+ tokens, does not fit"):
        reranker.compute_score(PAIRS)


def test_other_errors_are_not_taken_for_out_of_memory(reranker, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not memory")

    monkeypatch.setattr(reranker.model.model, "embed", broken)
    with pytest.raises(RuntimeError, match="not memory"):
        reranker.compute_score(PAIRS)


def test_bfloat16_is_close_to_float32(tiny_layerwise_path, reranker):
    half = MatryoshkaReranker(str(tiny_layerwise_path), use_bf16=True, devices="cpu", max_length=64)
    assert half.model.dtype == torch.bfloat16
    exact = torch.tensor(reranker.compute_score(PAIRS, cutoff_layers=[2, 6]))
    scale = exact.abs().max().item()
    close(half.compute_score(PAIRS, cutoff_layers=[2, 6]), exact.tolist(), 0.05 * scale)


def test_scoring_changes_no_global_state(reranker):
    def state():
        return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), list(warnings.filters)

    before = state()
    reranker.compute_score(PAIRS)
    reranker.rank(*("wing", ["a wing", "heat"]), cascade={2: 0.5})
    assert state() == before


def test_threads_score_at_different_depths_without_disturbing_each_other(reranker):
    settings = [{"cutoff_layers": layer, **width} for layer in (2, 3, 6) for width in WIDTHS] * 4
    expected = [reranker.compute_score(PAIRS, **setting) for setting in settings]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda setting: reranker.compute_score(PAIRS, **setting), settings))
    assert found == expected


@pytest.mark.slow
def test_a_thousand_calls_take_no_more_memory(reranker):
    def resident():
        gc.collect()
        return psutil.Process().memory_info().rss

    texts = ["a wing " * (1 + number % 40) for number in range(1000)]
    for text in texts[:200]:
        reranker.compute_score([("wing", text)] * 3, cutoff_layers=[3, 6], compress_layers=[2], compress_ratio=2)
    before = resident()
    for text in texts:
        reranker.compute_score([("wing", text)] * 3, cutoff_layers=[3, 6], compress_layers=[2], compress_ratio=2)
    assert resident() - before < 16 * 2**20


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("a string", "got the string 'a string'"),
        ([("a", "b"), ("a", None)], "the passage of pair 1 must be a string, got None"),
        ([(3, "b")], "the query of pair 0 must be a string, got 3"),
        ([("a", "b", "c")], r"pair 0 must be a query and a passage, got \('a', 'b', 'c'\)"),
        (["ab", "cd", "ef"], "pair 0 must be a query and a passage, got 'ab'"),
        ([("a", "b"), 7], "pair 1 must be a query and a passage, got 7"),
    ],
)
def test_what_is_not_a_pair_of_strings_is_named(pairs, message):
    with pytest.raises(TypeError, match=message):
        as_pairs(pairs)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"cutoff_layers": [1]}, ValueError, r"cutoff_layers \[1\] have no head. This model's exits are \[2, 3, 4"),
        ({"cutoff_layers": "6"}, TypeError, "cutoff_layers must be an int or a list of ints, got '6'"),
        ({"compress_layers": 0, "compress_ratio": 2}, ValueError, r"compress_layers \[0\] do not exist.* from 1 to 6"),
        ({"compress_layers": [7], "compress_ratio": 2}, ValueError, r"compress_layers \[7\] do not exist"),
        (
            {"compress_layers": [2], "compress_ratio": 3},
            ValueError,
            r"compress_ratio is 3, .*\[1, 2, 4, 8\]: the model",
        ),
        ({"compress_ratio": 2}, ValueError, "compress_ratio=2 needs compress_layers"),
        ({"compress_layers": 3, "compress_layer": 2}, ValueError, "two names of one argument"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"max_tokens_per_batch": 0}, ValueError, "max_tokens_per_batch is 0"),
        ({"max_length": -1}, ValueError, "max_length is -1"),
        ({"cutof_layers": [2]}, TypeError, r"unknown arguments \['cutof_layers'\]"),
        ({"max_length": 8, "query_max_length": 30}, ValueError, "leaves no room for its passage"),
        ({"prompt": "", "max_length": 4, "query_max_length": 30}, ValueError, "leaves no room for its passage"),
    ],
)
def test_bad_requests_are_named_before_the_model_runs(reranker, monkeypatch, overrides, error, message):
    monkeypatch.setattr(reranker.model, "forward", lambda *args, **kwargs: pytest.fail("the model ran"))
    with pytest.raises(error, match=message):
        reranker.compute_score([("how does a wing lift, and what does it carry?", "air " * 30)], **overrides)


def test_bad_defaults_are_refused_at_construction(tiny_layerwise_path):
    with pytest.raises(ValueError, match=r"cutoff_layers \[99\]"):
        MatryoshkaReranker(str(tiny_layerwise_path), cutoff_layers=[99])


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"compress_layers": [4, 5], "compress_ratio": 2, "cutoff_layers": [2, 4]}, 1),
        ({"compress_layer": 6, "compress_ratio": 2}, 1),
        ({"compress_layers": [3, 5], "compress_ratio": 2, "cutoff_layers": 4}, 0),
        ({"compress_layers": [4], "cutoff_layers": 4}, 0),
        ({"compress_ratio": 2, "cutoff_layers": 2}, 0),
    ],
)
def test_a_ratio_without_a_layer_to_compress_at_is_warned_about_once(tiny_layerwise_path, options, warned):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", compress_layers=[3])
    message = (
        r"compress_ratio=2 compresses nothing: compress_layers=\[\d.* lie at or above the deepest cutoff, layer \d"
    )
    calls = [lambda: reranker.compute_score(PAIRS[:1], **options)]
    if not isinstance(options.get("cutoff_layers"), list):
        calls.append(lambda: reranker.rank(*PAIRS[0][:1], ["air"], **options))
    for call in calls:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            call()
        assert [bool(re.search(message, str(one.message))) for one in found] == [True] * warned


def test_max_layer_loads_the_lower_layers_alone(tiny_layerwise_path, reranker):
    lower = MatryoshkaReranker(str(tiny_layerwise_path), max_layer=4, dtype="float32", devices="cpu", max_length=64)
    assert len(lower.model.model.layers) == 4
    close(lower.compute_score(PAIRS, cutoff_layers=[3, 4]), reranker.compute_score(PAIRS, cutoff_layers=[3, 4]))
    close(lower.compute_score(PAIRS), reranker.compute_score(PAIRS, cutoff_layers=4))
    with pytest.raises(ValueError, match=r"\[6\] have no head.*max_layer=4 were not loaded"):
        lower.compute_score(PAIRS, cutoff_layers=6)


@pytest.mark.parametrize(
    ("cutoff_layers", "exits"), [([4], [4]), ([2, 4], [2, 4]), ([2, 3, 5], [2, 3, 5]), (None, [6]), (3, [3])]
)
def test_an_exported_part_scores_as_the_whole(tiny_layerwise_path, tmp_path, cutoff_layers, exits):
    whole = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    whole.export(str(tmp_path / "part"), cutoff_layers)
    part = MatryoshkaReranker(str(tmp_path / "part"), dtype="float32", devices="cpu")
    assert part.config.exit_layers == exits
    assert len(part.model.model.layers) == exits[-1]
    pairs = [("what about the wing", "this text is about a wing"), ("flow", "air")]
    for width in ({}, {"compress_layers": [2], "compress_ratio": 2}):
        expected = whole.compute_score(pairs, cutoff_layers=exits, **width)
        found = part.compute_score(pairs, cutoff_layers=exits, **width)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=0)


def test_an_exit_that_does_not_exist_is_not_exported(tiny_layerwise_path, tmp_path):
    with pytest.raises(ValueError, match=r"cutoff_layers \[7\] have no head"):
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu").export(str(tmp_path / "part"), [7])
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("max_tokens", [1, 60, 100, 1000])
def test_batches_hold_so_many_tokens_and_no_score_depends_on_it(reranker, max_tokens, monkeypatch):
    expected = reranker.compute_score(PAIRS)
    sizes = []
    start = reranker._engine.start

    def recorded(task, between_batches):
        sizes.extend(task.batches)
        return start(task, between_batches)

    monkeypatch.setattr(reranker._engine, "start", recorded)
    found = reranker.compute_score(PAIRS, max_tokens_per_batch=max_tokens)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)
    assert sum(map(len, sizes)) == len(PAIRS)
    assert all(count_tokens(batch) <= max_tokens or len(batch) == 1 for batch in sizes)


CANDIDATES = ["", "a wing", "heat flux", "air flows over a wing. " * 6, "the flow of energy"]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_shared_query_changes_no_score(reranker, width):
    queries = ["how does a wing lift", "what is a heat flux?"]
    pairs = [(query, text) for text in CANDIDATES for query in queries]
    for cutoffs in ([6], [6, 2, 4]):
        alone = [reranker.compute_score(pair, cutoff_layers=cutoffs, **width) for pair in pairs]
        together = torch.tensor(reranker.compute_score(pairs, cutoff_layers=cutoffs, **width))
        expected = torch.tensor(alone)[..., 0].movedim(0, -1)
        close(together.tolist(), expected.reshape(together.shape).tolist(), 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_shared_query_is_computed_once(reranker, width):
    pairs = [("how does a wing lift", text) for text in CANDIDATES]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reranker.compute_score(pairs, **width)
    estimate = reranker.estimate_flops(pairs, **width)
    assert estimate == counter.get_total_flops()
    assert estimate < sum(reranker.estimate_flops(pair, **width) for pair in pairs)


TEXTS = [
    "Return the absolute value of a number.",
    "Open a file and return a stream.",
    "Sort a list in place.",
    "The argument may be an integer or a floating point number.",
    "Split a string at each newline.",
    "Remove a directory and all that is in it.",
]


@pytest.mark.parametrize(("method", "correlation"), [("int8", 0.995), ("nf4", 0.95)])
def test_fewer_bits_score_nearly_as_float32(method, correlation):
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    full, small = (
        MatryoshkaReranker(TINY_BASE, start_layer=3, devices="cpu", dtype="float32", quantization=quantization)
        for quantization in (None, method)
    )
    pairs = [(query, passage) for query in TEXTS for passage in TEXTS]
    for width in WIDTHS:
        scores = torch.tensor([model.compute_score(pairs, **width) for model in (full, small)])
        assert torch.corrcoef(scores)[0, 1] > correlation
        assert not torch.equal(scores[0], scores[1])
    wide = [name for name, value in small.model.named_parameters() if "proj" in name and value.is_floating_point()]
    assert not wide


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4"}, "quantization is 'int4'"),
        ({"quantization": "int8", "devices": ["cpu", "cpu"]}, r"one device, but devices are \['cpu', 'cpu'\]"),
        ({"quantization": "int8", "dtype": "float16"}, "is cpu and dtype torch.float16"),
    ],
)
def test_quantization_that_is_not_there_is_refused(tiny_layerwise_path, options, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaReranker(str(tiny_layerwise_path), **({"devices": "cpu"} | options))


def test_what_is_quantized_is_not_exported(tiny_layerwise_path, tmp_path):
    small = MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", quantization="int8")
    with pytest.raises(ValueError, match="quantization='int8': export"):
        small.export(str(tmp_path))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error(tiny_layerwise_path, value):
    broken = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    with torch.no_grad():
        head = broken.model.lm_head[-1].linear_head.weight
        head.zero_()
        head[0, 0] = value
    with pytest.raises(ArithmeticError, match=r"pair 0 has a score that is -?inf, computed in"):
        broken.compute_score([("a wing", "air")])


@pytest.mark.parametrize("devices", ["cpu", pytest.param(["cpu", "cpu"], marks=pytest.mark.slow)])
def test_a_score_that_is_no_number_is_an_error(tiny_layerwise_path, devices):
    with MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices=devices) as broken:
        with torch.no_grad():
            broken.model.model.layers[4].mlp.up_proj.weight.fill_(torch.nan)
        pairs = [("a wing", "air"), ("a wing", "heat")]
        assert len(broken.compute_score(pairs, cutoff_layers=[4])) == 2
        message = r"pair \d has a score that is not a number, computed in torch.float32"
        with pytest.raises(ArithmeticError, match=message):
            broken.compute_score(pairs)
        with pytest.raises(ArithmeticError, match=message):
            broken.rank("a wing", ["air", "heat", "flow"], cascade={3: 0.5})


@pytest.mark.parametrize("name", ["batch_size", "max_tokens_per_batch", "max_length", "query_max_length"])
def test_a_size_of_nothing_is_refused_when_it_is_given_to_the_constructor(name, tiny_layerwise_path):
    with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", **{name: 0})
