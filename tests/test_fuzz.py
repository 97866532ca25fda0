"""Inputs that nobody has thought of: every public entry gives a result or an error with words, and is the same
afterwards."""

import json
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagembedding_matryoshka import MatryoshkaReranker, Setting
from flagembedding_matryoshka.cli.rows import as_list, as_pair, read
from flagembedding_matryoshka.evaluation.candidates import from_run
from flagembedding_matryoshka.finetune.losses import TRAIN_METHODS
from flagembedding_matryoshka.mining.rows import row_fault
from flagembedding_matryoshka.text.collections import read_collection
from flagembedding_matryoshka.text.lines import good_rows
from flagembedding_matryoshka.text.templates import TEMPLATES, Template
from tests.collection import write_collection

PAIR = ("how does a wing lift", "air flows faster")
DOCUMENTS = ["air flows", "a wing lifts", "heat"]
UNNAMED = re.compile(r"not supported between|object is not|has no attribute|argument of type|must be real number")
"""What Python itself says, of a value and not of an argument."""

# Small, and half of them good: an example that fails at its first argument says nothing of the others.
TEXT = st.sampled_from(["", "a wing", "heat", "\0", "</s>", "{}", "wing " * 30, "\ud83d"]) | st.text(max_size=6)
ODD = st.sampled_from([-1, 0, 0.5, 2.0, 2**70, True, math.nan, math.inf, "3", "", b"3", (), [3], [[]], {}, {3: 0.5}])


def mostly(good):
    return st.one_of(*[good] * 7, ODD)


LAYERS = mostly(st.none() | st.integers(2, 6) | st.lists(st.integers(2, 6), min_size=1, max_size=2))
SHARE = mostly(st.sampled_from([0.1, 0.5, 0.5, 0.9, 1.0]))
CASCADE = mostly(
    st.none() | st.dictionaries(mostly(st.integers(2, 5)).filter(lambda key: key.__hash__), SHARE, max_size=2)
)
LENGTH = mostly(st.none() | st.integers(1, 64))
DEPTH_AND_WIDTH = {
    "cutoff_layers": LAYERS,
    "compress_layers": LAYERS,
    "compress_ratio": mostly(st.sampled_from([None, 1, 2, 4, 8])),
    "store_layer": mostly(st.none() | st.integers(-1, 6)),
}
OF_TEXTS = {
    "prompt": mostly(TEXT),
    "query_max_length": LENGTH,
    "max_length": mostly(st.sampled_from([None, 16, 64, 512])),
    "query_instruction_for_rerank": mostly(TEXT),
    "passage_instruction_format": mostly(st.sampled_from(["{}{}", "{} {}\\n", "{}{}}}", "{{}}{}", "{}{x}{}", "{"])),
}
OF_BATCHES = {
    "batch_size": LENGTH,
    "max_tokens_per_batch": LENGTH,
    "normalize": mostly(st.booleans()),
    "unknown": st.just(1),
}
PAIRS = mostly(st.lists(st.tuples(TEXT, TEXT), max_size=3) | st.tuples(TEXT, TEXT) | st.lists(mostly(TEXT), max_size=2))
LIST = mostly(st.lists(mostly(TEXT), max_size=3) | st.lists(TEXT, max_size=4))
VALUE = st.recursive(TEXT | ODD | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("query", "passage", "title", "_id", "text"), mostly(TEXT)),
        **dict.fromkeys(("documents", "pos", "neg", "passages"), LIST),
        **dict.fromkeys(("pos_scores", "neg_scores"), mostly(st.lists(st.floats(), max_size=3))),
    },
).map(lambda row: json.dumps(row, default=repr))
MALFORMED = st.sampled_from(
    ["[" * 2000, "9" * 5000, "1e999", "[1, 2", "]", "q\tQ0\tp 1 1 x", "query-id\tcorpus-id\tscore"]
)
LINE = ROW | st.text(max_size=8) | MALFORMED


def options(*groups):
    """A call with at most three of them, so that most are good."""
    every = {name: values for group in groups for name, values in group.items()}
    names = st.lists(st.sampled_from(sorted(every)), max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: every[name] for name in chosen}))


SCORING = options(DEPTH_AND_WIDTH, OF_TEXTS, OF_BATCHES)
FUSION = options(
    {"cascade": CASCADE, "top_k": st.none() | st.integers(1, 4)},
    {"fusion": mostly(st.sampled_from([0, 0.5, 3])), "first_stage": mostly(st.just("order"))},
)
RANKING = FUSION | options(
    DEPTH_AND_WIDTH,
    OF_TEXTS,
    OF_BATCHES,
    {"top_k": mostly(st.none() | st.integers(1, 4)), "return_documents": st.booleans(), "cascade": CASCADE},
)


class Tried:
    """The re-ranker of all examples, what it gives for good ones, and a directory for files."""

    def __init__(self, path, folder):
        self.reranker = MatryoshkaReranker(str(path), dtype="float32", devices="cpu")
        self.folder = folder
        self.before = self.now()

    def now(self):
        return self.reranker.compute_score(PAIR), self.reranker.rank("wing", DOCUMENTS, cascade={3: 0.5})


@pytest.fixture(scope="module")
def tried(tiny_layerwise_path, one_thread, tmp_path_factory):
    return Tried(tiny_layerwise_path, tmp_path_factory.mktemp("fuzz"))


def result(work):
    """What `work` gives; None where it raises an error that names what is wrong."""
    try:
        return work()
    except (TypeError, ValueError, FileNotFoundError) as error:
        assert len(str(error)) > 20 and not UNNAMED.search(str(error)), repr(error)
        return None


def is_ranking(hits, documents, given):
    places = [hit["corpus_id"] for hit in hits]
    assert len(set(places)) == len(places) == min(len(documents), given.get("top_k") or len(documents))
    assert all(math.isfinite(hit["score"]) for hit in hits)
    fuses = given.get("first_stage") is not None
    assert all(("fused_score" in hit) == fuses and math.isfinite(hit.get("fused_score", 0)) for hit in hits)
    order = [(hit.get("cutoff_layer", 0), hit["fused_score" if fuses else "score"]) for hit in hits]
    assert order == sorted(order, reverse=True)
    if given.get("return_documents"):
        assert [hit["text"] for hit in hits] == [documents[place] for place in places]


def compute_score(tried, data):
    pairs, given = data.draw(PAIRS), data.draw(SCORING)
    scores = result(lambda: tried.reranker.compute_score(pairs, **given))
    if scores:
        count = 1 if isinstance(pairs[0], str) else len(pairs)
        exits = scores if isinstance(scores[0], list) else [scores]
        assert all(len(of_exit) == count and all(map(math.isfinite, of_exit)) for of_exit in exits)


def rank(tried, data):
    query, documents, given = data.draw(mostly(TEXT)), data.draw(LIST), data.draw(RANKING)
    hits = result(lambda: tried.reranker.rank(query, documents, **given))
    if hits is not None:
        is_ranking(hits, documents, given)


def rank_batch(tried, data):
    queries, given = data.draw(mostly(st.lists(mostly(TEXT), max_size=2))), data.draw(RANKING)
    lists = (
        data.draw(mostly(st.lists(LIST, min_size=len(queries), max_size=len(queries))))
        if isinstance(queries, list)
        else []
    )
    rankings = result(lambda: tried.reranker.rank_batch(queries, lists, **given))
    one_by_one = result(lambda: list(tried.reranker.rank_iter(queries, lists, **given)))
    assert one_by_one == rankings
    if rankings is not None:
        assert len(rankings) == len(queries)
        for hits, documents in zip(rankings, lists, strict=True):
            is_ranking(hits, documents, given)


def tokenize(tried, data):
    pairs, given = data.draw(PAIRS), data.draw(options(OF_TEXTS))
    found = result(lambda: tried.reranker.tokenize(pairs, **given))
    # Texts may be tokenised to lengths that the model has no positions for, and are then not scored.
    scores = result(lambda: tried.reranker.compute_score(pairs, **given))
    if found and scores is not None:
        assert tried.reranker.compute_score(found) == pytest.approx(scores, abs=1e-5)
    assert found is None or scores is not None or given["max_length"] > tried.reranker.config.max_position_embeddings


def score_lists(tried, data):
    pairs = tried.reranker.tokenize([("wing", text) for text in DOCUMENTS])
    lists = data.draw(mostly(st.lists(st.lists(mostly(st.sampled_from(pairs)), max_size=3), max_size=2)))
    given = data.draw(options(DEPTH_AND_WIDTH, OF_BATCHES, {"prompt": TEXT, "cascade": CASCADE}))
    found = result(lambda: tried.reranker.score_lists(lists, **given))
    if found is not None:
        assert list(map(len, found)) == list(map(len, lists))
        assert all(math.isfinite(hit["score"]) for hits in found for hit in hits)


def counts(tried, data):
    query, documents, given = data.draw(mostly(TEXT)), data.draw(LIST), data.draw(options(OF_TEXTS))
    found = result(lambda: tried.reranker.count_tokens(query, documents, **given))
    assert found is None or len(found[1]) == len(documents)
    pairs, given = data.draw(PAIRS), data.draw(SCORING)
    depths = data.draw(st.none() | mostly(st.lists(st.integers(2, 7), max_size=3)))
    cost = result(lambda: tried.reranker.estimate_flops(pairs, depths, **given))
    assert cost is None or (isinstance(cost, int) and (cost > 0) == bool(len(pairs)))


def setting(tried, data):
    given = data.draw(st.fixed_dictionaries({}, optional=DEPTH_AND_WIDTH | {"cascade": CASCADE}))
    result(lambda: tried.reranker.setting(**given))
    found = result(lambda: Setting.resolve(tried.reranker.config, **given))
    assert found is None or Setting(**json.loads(json.dumps(found.to_json()))) == found
    values = data.draw(st.lists(VALUE, min_size=1, max_size=4))
    found = result(lambda: Setting(*values))
    assert found is None or Setting(**found.to_json()) == found


def template(tried, data):
    names = st.sampled_from([*Template.__dataclass_fields__, "sufix"])
    source = data.draw(
        st.dictionaries(names, TEXT | VALUE, max_size=2) | st.sampled_from([*TEMPLATES, "~nobody"]) | VALUE
    )
    found = result(lambda: Template.load(source))
    if found is not None:
        assert Template.load(found.to_json()) == found
        for text in (found.query("\1"), found.passage("\1")):
            assert "\1" in text


def files(tried, data):
    text = data.draw(st.lists(LINE, max_size=3).map("\n".join) | ROW.map("[{}]".format))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    content = text.encode(encoding, "surrogatepass" if "8" in encoding else "replace")
    content = content[: data.draw(st.sampled_from([None, None, -1]))]
    name = data.draw(st.sampled_from(["a.json", "a.jsonl", "a.tsv", "a"]))
    path = tried.folder / name
    path.write_bytes(content)
    result(lambda: list(read(path, as_pair)))
    result(lambda: list(read(path, as_list)))
    for kind in {method.row_kind for method in TRAIN_METHODS.values()}:
        result(partial(lambda check: list(good_rows(path, check)), partial(row_fault, kind=kind)))
    part = data.draw(st.sampled_from(["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]))
    directory = write_collection(tried.folder / "beir")
    result(lambda: from_run(read_collection(directory, "test"), path, 3))
    (directory / part).write_bytes(content)
    result(lambda: read_collection(directory, "test"))
    if name != "a.tsv":
        result(lambda: Template.load(path))


ENTRIES = [compute_score, rank, rank_batch, tokenize, score_lists, counts, setting, template, files]


def try_inputs(entry, tried, examples):
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data):
        entry(tried, data)

    threads = torch.get_num_threads()
    check()
    assert tried.now() == tried.before and torch.get_num_threads() == threads


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("examples", [30, pytest.param(1200, marks=pytest.mark.slow)])
def test_inputs(entry, examples, tried):
    try_inputs(entry, tried, examples)
