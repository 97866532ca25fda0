"""Passages whose states are computed once and read for any query."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import store as module
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.store import PassageStore
from flagembedding_matryoshka.models.split import BLOCK, from_int8
from tests.backbones import FIRST, layer_wise, let_heads_differ, write_raw
from tests.qwen import write_causal_lm

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["wing", "flow", "body", "heat", "shock", "plate", "speed", "layer"]
TEXTS = {f"d{i}": " ".join(WORDS[(7 * i + j) % 8] for j in range(1 + 5 * i % 13)) for i in range(14)} | {
    "empty": "",
    "long": "a wing in the air of 1903 " * 40,
}
IDS = list(TEXTS)
QUERIES = ["what about the wing", "the flow of heat", "shock " * 60]
LENGTHS = {"query_max_length": 24, "max_length": 96}
CASCADES = [None, {4: 0.5, 5: 0.2}]


@pytest.fixture(scope="module", params=FIRST)
def reranker(request, tiny_tokenizer, tmp_path_factory):
    """With heads that differ, of several backbones, of which two have windows."""
    model = layer_wise(write_raw(request.param, tiny_tokenizer, tmp_path_factory.mktemp(request.param)))
    let_heads_differ(model)
    path = tmp_path_factory.mktemp("layer_wise")
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return MatryoshkaReranker(str(path), dtype="float32", devices="cpu", **LENGTHS)


@pytest.fixture(scope="module")
def mistral(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", **LENGTHS)


def by_id(ranking):
    return {hit.get("id", IDS[hit["corpus_id"]]): hit for hit in ranking}


def same(stored, texts, tolerance=2e-6):
    """Two rankings of the same passages: the same hits but for rounding."""
    stored, texts = by_id(stored), by_id(texts)
    assert stored.keys() == texts.keys()
    for name, hit in texts.items():
        own = dict(stored[name])
        assert own.pop("id") == name
        assert own.pop("score") == pytest.approx(hit["score"], abs=tolerance)
        assert own.keys() == hit.keys() - {"score"}
        assert all(own[key] == hit[key] for key in own if key != "fused_score")


@pytest.mark.parametrize("cascade", CASCADES)
@pytest.mark.parametrize(
    "setting",
    [
        {"store_layer": 2, "compress_ratio": 1},
        {"store_layer": 2, "compress_ratio": 4},
        {"store_layer": 1, "compress_ratio": 8},
        {"store_layer": 2, "compress_ratio": 2, "compress_layers": [2, 4]},
        {"store_layer": 2, "compress_ratio": 2, "compress_layers": [4]},
    ],
)
def test_stored_passages_rank_as_texts(reranker, setting, cascade, tmp_path):
    store = reranker.store(TEXTS, tmp_path / "store", **setting)
    texts = reranker.rank_batch(QUERIES, [list(TEXTS.values())] * 3, cascade=cascade, **setting)
    given = {name: setting[name] for name in ("compress_layers", "compress_ratio") if "compress_layers" in setting}
    for ids in (IDS, IDS[::-1]):
        stored = reranker.rank_batch(QUERIES, ids=[ids] * 3, store=store, cascade=cascade, batch_size=5, **given)
        for own, expected in zip(stored, texts, strict=True):
            same([{**hit, "corpus_id": IDS.index(hit["id"])} for hit in own], expected)
            assert [hit["id"] for hit in own] == [ids[hit["corpus_id"]] for hit in own]
    assert len({round(hit["score"], 4) for hit in texts[0]}) > 10
    assert any(hit.get("is_truncated") for hit in texts[0]) and any(not hit.get("is_truncated") for hit in texts[0])


def test_all_arguments_of_a_ranking_that_need_no_text_work(mistral, tmp_path):
    path = tmp_path / "store"
    mistral.store(TEXTS.items(), path, store_layer=3, compress_ratio=4)
    texts = list(TEXTS.values())
    options = {"store_layer": 3, "compress_ratio": 4, "cutoff_layers": 5}
    for more in (
        {"normalize": True},
        {"top_k": 3, "min_score": -100.0},
        {"first_stage": "order", "fusion": 0.5},
        {"deadline_ms": 1e9},
        {"deadline_ms": 1e-9},
    ):
        same(
            mistral.rank(QUERIES[0], ids=IDS, store=path, cutoff_layers=5, **more),
            mistral.rank(QUERIES[0], texts, **options, **more),
        )
    few = mistral.rank(QUERIES[0], ids=["d3", "d1", "d3"], store=str(path))
    assert sorted(hit["id"] for hit in few) == ["d1", "d3", "d3"] and few[0]["corpus_id"] in (0, 1, 2)
    assert mistral.rank(QUERIES[0], ids=[], store=path) == []


@pytest.mark.parametrize("ratio", [1, 4])
def test_in_bfloat16_scores_that_do_not_depend_on_the_batch_are_the_same_bits(tiny_layerwise_path, ratio, tmp_path):
    reranker = MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="bfloat16", devices="cpu", batch_invariant=True, **LENGTHS
    )
    setting = {"store_layer": 2, "compress_ratio": ratio}
    store = reranker.store(TEXTS, tmp_path / "store", **setting)
    assert load_file(store.path / "00000.safetensors")["states"].dtype == torch.bfloat16
    stored = by_id(reranker.rank(QUERIES[0], ids=IDS[::-1], store=store))
    texts = by_id(reranker.rank(QUERIES[0], list(TEXTS.values()), **setting))
    assert {name: hit["score"] for name, hit in stored.items()} == {name: hit["score"] for name, hit in texts.items()}


def test_layers_up_to_the_store_layer_see_no_passage(mistral, tmp_path, monkeypatch):
    store = mistral.store(TEXTS, tmp_path / "store", store_layer=3, compress_ratio=4)
    tokens = []
    for depth, layer in enumerate(mistral.model.model.layers, start=1):
        layer.register_forward_hook(
            lambda _module, arguments, _output, depth=depth: tokens.append((depth, arguments[0].shape[1]))
        )
    mistral.rank(QUERIES[0], ids=IDS, store=store)
    for layer in mistral.model.model.layers:
        layer._forward_hooks.clear()
    (pair,) = mistral.tokenize([(QUERIES[0], "")])
    below = {count for depth, count in tokens if depth <= 3}
    assert below == {pair.query_length + pair.prompt_length}
    assert min(count for depth, count in tokens if depth == 4) > 2 * max(below)


@pytest.mark.parametrize("ratio", [1, 4])
def test_operations_are_those_that_torch_counts(mistral, ratio, tmp_path):
    store = mistral.store(TEXTS, tmp_path / "store", store_layer=3, compress_ratio=ratio)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mistral.rank(QUERIES[0], ids=IDS, store=store)
    pairs, setting = [(QUERIES[0], text) for text in TEXTS.values()], {"store_layer": 3, "compress_ratio": ratio}
    assert mistral.estimate_flops(pairs, stored=True, **setting) == counter.get_total_flops()
    assert counter.get_total_flops() < 0.7 * mistral.estimate_flops(pairs, **setting)
    with pytest.raises(ValueError, match="stored=True needs a store_layer"):
        mistral.estimate_flops(pairs, stored=True)


def test_a_store_knows_its_bytes(mistral, tmp_path):
    wide, narrow = (
        mistral.store(TEXTS, tmp_path / str(ratio), store_layer=3, compress_ratio=ratio) for ratio in (1, 8)
    )
    files = sum(load_file(path)["states"].nbytes for path in (tmp_path / "8").glob("*.safetensors"))
    tokens = [pair.passage_length for pair in mistral.tokenize([("", text) for text in TEXTS.values()], store_layer=3)]
    assert narrow.nbytes == files == 4 * 32 * sum(-(-count // 8) for count in tokens)
    assert wide.nbytes == 4 * 32 * sum(tokens)
    assert narrow.bytes_per_passage == pytest.approx(files / len(TEXTS)) and len(narrow) == len(TEXTS)
    assert list(narrow) == IDS and "d1" in narrow and "d99" not in narrow


def computed(monkeypatch):
    """The number of passages of each batch that is computed from here on."""
    counts, of_engine = [], Engine.passage_states
    monkeypatch.setattr(
        Engine, "passage_states", lambda self, ids, setting: counts.append(len(ids)) or of_engine(self, ids, setting)
    )
    return counts


def test_an_interrupted_run_goes_on_and_a_later_one_appends(mistral, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PASSAGES_AT_ONCE", 3)
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    path, options = tmp_path / "store", {"store_layer": 3, "compress_ratio": 2}
    counts = computed(monkeypatch)

    def broken():
        yield from list(TEXTS.items())[:7]
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        mistral.store(broken(), path, **options)
    assert sum(counts) == 6 and len(PassageStore(path)) == 6
    (path / "00002.safetensors").write_bytes(b"a shard without an index, of a process that was killed")
    counts.clear()
    rest = dict(list(TEXTS.items())[:12])
    assert len(mistral.store(rest, path, **options)) == 12 and sum(counts) == 6
    counts.clear()
    assert len(mistral.store(TEXTS, path, **options)) == len(TEXTS) and sum(counts) == len(TEXTS) - 12
    counts.clear()
    mistral.store(TEXTS, path, **options)
    assert counts == []
    same(mistral.rank(QUERIES[0], ids=IDS, store=path), mistral.rank(QUERIES[0], list(TEXTS.values()), **options))


@pytest.mark.parametrize("cascade", CASCADES)
def test_a_list_may_have_stored_passages_and_texts(mistral, tmp_path, monkeypatch, cascade):
    options = {"store_layer": 3, "compress_ratio": 4}
    few = {name: TEXTS[name] for name in IDS[::3]}
    store = mistral.store(few, tmp_path / "store", **options)
    texts = mistral.rank_batch(QUERIES, [list(TEXTS.values())] * 3, cascade=cascade, **options)
    counts = computed(monkeypatch)
    without_texts = [None if name in few else text for name, text in TEXTS.items()]
    for documents in (list(TEXTS.values()), without_texts):
        found = mistral.rank_batch(QUERIES, [documents] * 3, ids=[IDS] * 3, store=store, cascade=cascade)
        for own, expected in zip(found, texts, strict=True):
            same(own, expected)
        assert sum(counts) == 3 * (len(TEXTS) - len(few))
        counts.clear()
    ids = [name if name in few else None for name in IDS]
    own = mistral.rank(QUERIES[0], list(TEXTS.values()), ids=ids, store=store, return_documents=True)
    expected = mistral.rank(QUERIES[0], list(TEXTS.values()), **options)
    assert [hit["corpus_id"] for hit in own] == [hit["corpus_id"] for hit in expected]
    for hit in own:
        assert hit.get("id") == ids[hit["corpus_id"]] and hit["text"] == TEXTS[IDS[hit["corpus_id"]]]
    assert len(store) == len(few)


def test_a_stream_of_lists_may_have_ids(mistral, tmp_path):
    store = mistral.store(TEXTS, tmp_path / "store", store_layer=3, compress_ratio=4)
    expected = mistral.rank_batch(QUERIES, ids=[IDS] * 3, store=store, top_k=4)
    streamed = mistral.rank_iter(iter(QUERIES), ids=(iter(IDS) for _ in QUERIES), store=store.path, top_k=4)
    for own, other in zip(streamed, expected, strict=True):
        assert own == [hit | {"score": pytest.approx(hit["score"], abs=2e-6)} for hit in other]
    with pytest.raises(ValueError, match="give both of them or neither"):
        mistral.rank_iter(QUERIES, ids=[IDS] * 3)
    with pytest.raises(ValueError, match="query 1 has 15 ids, but 16 documents"):
        list(mistral.rank_iter(QUERIES[:2], [TEXTS.values()] * 2, ids=[IDS, IDS[:-1]], store=store))


def test_deleted_passages_are_gone_and_may_be_stored_anew(mistral, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PASSAGES_AT_ONCE", 4)
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    path, options = tmp_path / "store", {"store_layer": 3, "compress_ratio": 2}
    store = mistral.store(TEXTS, path, **options)
    every = mistral.rank(QUERIES[0], ids=IDS, store=store)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    with pytest.raises(ValueError, match=r"has no passage with the id 'd99'"):
        store.delete(["d1", "d99"])
    assert len(store) == len(PassageStore(path)) == len(TEXTS)
    gone = [*IDS[4:8], IDS[0]]  # a whole shard, and a passage of another one
    store.delete(gone)
    for left in (store, PassageStore(path)):
        assert list(left) == [name for name in IDS if name not in gone] and len(left) == len(TEXTS) - 5
        assert left.nbytes == sum(load_file(file)["states"].nbytes for file in path.glob("*.safetensors")) - size_of(
            mistral, TEXTS[IDS[0]], options
        )
        ranking = mistral.rank(QUERIES[0], ids=list(left), store=left)
        assert [hit["id"] for hit in ranking] == [hit["id"] for hit in every if hit["id"] not in gone]
        with pytest.raises(ValueError, match="has no passage with the id"):
            mistral.rank(QUERIES[0], ids=IDS, store=left)
    assert sorted(file.name for file in path.glob("*.safetensors")) == [files[0], *files[2:]]
    changed = {name: f"{TEXTS[name]} and the wing" for name in gone}
    mistral.store(changed, path, **options)
    same(
        mistral.rank(QUERIES[0], ids=IDS, store=path),
        mistral.rank(QUERIES[0], list((TEXTS | changed).values()), **options),
    )


def size_of(reranker, text, setting):
    """Bytes of the states of a passage."""
    tokens = reranker.tokenize([("", text)], **setting)[0].passage_length
    return -(-tokens // setting["compress_ratio"]) * reranker.config.hidden_size * 4


def test_another_text_with_an_id_is_refused(mistral, tmp_path):
    path, options = tmp_path / "store", {"store_layer": 3}
    mistral.store({"a": "a wing", "b": "heat"}, path, **options)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(ValueError, match=r"passage 1 has the id 'b', under which the store .* has another text"):
        mistral.store({"c": "new", "b": "heat."}, path, **options)
    with pytest.raises(ValueError, match=r"passage 2 has the id 'c', under which the store .* has another text"):
        mistral.store([("c", "new"), ("c", "new"), ("c", "newer")], path, **options)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    for broken in ([("a", 3)], [(1, "a")], ["ab"], [("a", "b", "c")], [None]):
        with pytest.raises(TypeError, match=r"passage 0 must be an id and a text, both strings"):
            mistral.store(broken, path, **options)


def test_a_store_of_another_model_template_or_setting_is_refused_by_name(mistral, tiny_layerwise_path, tmp_path):
    path, options = tmp_path / "store", {"store_layer": 3, "compress_ratio": 4}
    mistral.store(TEXTS, path, **options)
    other = MatryoshkaReranker(str(tiny_layerwise_path), dtype="bfloat16", devices="cpu", **LENGTHS)
    for use in (lambda: other.rank("wing", ids=IDS, store=path), lambda: other.store(TEXTS, path, **options)):
        with pytest.raises(ValueError, match=r"the store .* was made with model='\w+', and not '\w+'"):
            use()
    for changes, message in (
        ({"store_layer": 2}, "store_layer=3, and not 2"),
        ({"compress_ratio": 2}, "compress_ratio=4, and not 2"),
        ({"compress_layers": [4]}, "compress_ratio=4, and not 1"),
        ({"passage_instruction_for_rerank": "P: "}, "passage_instruction='B: ', and not 'P: '"),
        ({"passage_instruction_format": "{}: {}"}, "passage_format='{}{}', and not '{}: {}'"),
        ({"max_length": 90}, r"passage_max_length=\d+, and not \d+"),
    ):
        message = r"the store .* was made with .*" + message.replace("{", r"\{").replace("}", r"\}")
        with pytest.raises(ValueError, match=message):
            mistral.rank("wing", ids=IDS, store=path, **changes)
        with pytest.raises(ValueError, match=message):
            mistral.store(TEXTS, path, **options | changes)
    # Words of the query are not among the conditions.
    same(
        mistral.rank("wing", ids=IDS, store=path, query_instruction_for_rerank="Q: "),
        mistral.rank("wing", list(TEXTS.values()), query_instruction_for_rerank="Q: ", **options),
    )


def test_wrong_requests_are_refused(mistral, tmp_path):
    path = tmp_path / "store"
    mistral.store(TEXTS, path, store_layer=3)
    with pytest.raises(ValueError, match="needs the documents of each query, or ids and a store"):
        mistral.rank("wing")
    for arguments in ({"ids": IDS}, {"documents": ["a"], "store": path}, {"store": path}):
        with pytest.raises(ValueError, match=r"ids are .* and store is .*: give both of them or neither"):
            mistral.rank("wing", **arguments)
    for documents, ids, message in (
        (None, ["d1", "d99"], r"the store .* has no passage with the id 'd99'"),
        ([TEXTS["d1"], None], ["d1", "d99"], r"the store .* has no passage with the id 'd99'"),
        (["a"], ["d1", "d2"], "query 0 has 2 ids, but 1 documents"),
        ([TEXTS["d1"], "other"], ["d1", "d2"], r"passage 1 has the id 'd2', under which the store .* has another text"),
        (["a", None], ["d1", None], "passage 1 of query 0 has neither an id nor a text"),
        (None, ["d1", None], "passage 1 of query 0 has neither an id nor a text"),
    ):
        with pytest.raises(ValueError, match=message):
            mistral.rank("wing", documents, ids=ids, store=path)
    for documents, ids, message in (
        (None, ["d1", 2], "id 1 of query 0 must be a string or None, got 2"),
        (["a", 2], ["d1", None], "document 1 of query 0 must be a string or None, got 2"),
        (None, "d1", "the ids of query 0 must be a list, got the string 'd1'"),
        ("a", ["d1"], "the documents of query 0 must be a list, got the string 'a'"),
    ):
        with pytest.raises(TypeError, match=message):
            mistral.rank("wing", documents, ids=ids, store=path)
    for queries, ids, name in ((["wing"], [], "ids"), ([], [IDS], "queries")):
        with pytest.raises(ValueError, match=f"queries, ids must have the same length, but {name} ends after 0"):
            mistral.rank_batch(queries, ids=ids, store=path)
    with pytest.raises(TypeError, match=r"query 0 must be a string, got 3"):
        mistral.rank_batch([3], ids=[IDS], store=path)
    with pytest.raises(ValueError, match="chunk needs the texts of all documents"):
        mistral.rank("wing", ids=IDS, store=path, chunk=True)
    for documents in (None, [TEXTS["d1"], None]):
        with pytest.raises(ValueError, match=r"return_documents needs the text of passage [01] of query 0"):
            mistral.rank("wing", documents, ids=["d1", "d2"], store=path, return_documents=True)
    with pytest.raises(ValueError, match="store_layer is 0"):
        mistral.store(TEXTS, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"there is no store .*nothing"):
        mistral.rank("wing", ids=IDS, store=tmp_path / "nothing")
    states = load_file(path / "00000.safetensors")["states"]
    save_file({"states": states[:-1].clone()}, path / "00000.safetensors")
    with pytest.raises(
        ValueError, match=rf"00000.safetensors has {len(states) - 1} tokens, and its index {len(states)}"
    ):
        mistral.rank("wing", ids=IDS, store=path)
    noted = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps(noted | {"version": 2}))
    with pytest.raises(ValueError, match="is not of version 1"):
        mistral.rank("wing", ids=IDS, store=path)


def test_a_template_that_begins_with_the_passage_is_refused(tmp_path):
    write_causal_lm(tmp_path / "ctxl-rerank-v2", tie_word_embeddings=False)
    reranker = MatryoshkaReranker(str(tmp_path / "ctxl-rerank-v2"), dtype="float32", devices="cpu", start_layer=2)
    with pytest.raises(ValueError, match="passages of a template with passage_first cannot be stored"):
        reranker.store(TEXTS, tmp_path / "store", store_layer=2)


def test_several_devices_are_refused_before_work(tiny_layerwise_path, tmp_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices=["cpu", "cpu"])
    with reranker, pytest.raises(ValueError, match=r"a store works on one device, .* has \['cpu', 'cpu'\]"):
        reranker.store(TEXTS, tmp_path / "store", store_layer=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("cascade", CASCADES)
def test_stored_pairs_are_scored_as_their_ranking(mistral, tmp_path, ratio, cascade):
    setting = {"store_layer": 2, "compress_ratio": ratio}
    mistral.store(TEXTS, tmp_path, **setting)
    lists = [mistral.stored_pairs(query, IDS, tmp_path) for query in QUERIES]
    found = mistral.score_lists(lists, cascade=cascade, **setting)
    for query, hits in zip(QUERIES, found, strict=True):
        ranking = by_id(mistral.rank(query, ids=IDS, store=tmp_path, cascade=cascade))
        assert [hit["score"] for hit in hits] == [pytest.approx(ranking[name]["score"], abs=2e-6) for name in IDS]
        assert [hit.get("is_truncated") for hit in hits] == [ranking[name].get("is_truncated") for name in IDS]
    if cascade is None:
        scores = mistral.compute_score(lists[0], **setting)
        assert scores == pytest.approx([hit["score"] for hit in found[0]], abs=2e-6)
        short = [name for name in IDS if name != "long"]  # what is truncated is not counted alike
        pairs = [(QUERIES[0], TEXTS[name]) for name in short]
        expected = mistral.estimate_flops(pairs, stored=True, **setting)
        assert mistral.estimate_flops(mistral.stored_pairs(QUERIES[0], short, tmp_path), **setting) == expected


def test_stored_pairs_of_another_setting_or_beside_others_are_refused(mistral, tmp_path):
    mistral.store(TEXTS, tmp_path, store_layer=2, compress_ratio=4)
    pairs = mistral.stored_pairs(QUERIES[0], IDS[:2], tmp_path)
    wrong = [
        ({}, "store_layer=2 and compress_ratio=4, but the call has 0 and 1"),
        ({"store_layer": 3, "compress_ratio": 4}, "but the call has 3 and 4"),
        ({"store_layer": 2}, "but the call has 2 and 1"),
        ({"store_layer": 2, "compress_ratio": 4, "compress_layers": [3]}, "but the call has 2 and 1"),
    ]
    for setting, message in wrong:
        for call in (
            mistral.compute_score,
            mistral.estimate_flops,
            lambda own, **given: mistral.score_lists([own], **given),
        ):
            with pytest.raises(ValueError, match=message):
                call(pairs, **setting)
    others = mistral.tokenize([(QUERIES[0], "a wing")])
    with pytest.raises(ValueError, match="need separate calls"):
        mistral.score_lists([pairs, others], store_layer=2, compress_ratio=4)
    with pytest.raises(ValueError, match="has no passage with the id 'x'"):
        mistral.stored_pairs(QUERIES[0], ["x"], tmp_path)
    with pytest.raises(TypeError, match="id 0 of query 0 must be a string or None"):
        mistral.stored_pairs(QUERIES[0], [3], tmp_path)
    with pytest.raises(ValueError, match="was made with store_layer=2"):
        mistral.stored_pairs(QUERIES[0], IDS[:1], tmp_path, store_layer=3)


@pytest.mark.parametrize("cascade", CASCADES)
@pytest.mark.parametrize("ratio", [1, 4])
def test_states_in_int8_score_as_the_states_that_they_stand_for(reranker, tmp_path, ratio, cascade):
    setting = {"store_layer": 2, "compress_ratio": ratio}
    wide = reranker.store(TEXTS, tmp_path / "wide", **setting)
    narrow = reranker.store(TEXTS, tmp_path / "narrow", **setting, state_quantization="int8")
    hidden = reranker.config.hidden_size
    assert narrow.nbytes == wide.nbytes * (hidden + 2 * -(-hidden // BLOCK)) / (4 * hidden)
    assert narrow.nbytes == sum(load_file(path)["states"].nbytes for path in narrow.path.glob("*.safetensors"))
    of_wide, of_narrow = ([reranker.stored_pairs(query, IDS, store) for query in QUERIES] for store in (wide, narrow))
    lists = []
    for own, others in zip(of_narrow, of_wide, strict=True):
        lists.append([replace(pair, states=from_int8(pair.states, hidden)) for pair in own])
        for pair, other in zip(lists[-1], others, strict=True):
            assert pair.states.shape == other.states.shape and pair.passage_length == other.passage_length
            largest = other.states.abs().max() if len(other.states) else 0
            assert ((pair.states - other.states).abs() <= largest / 127 * 0.51).all()
    expected = reranker.score_lists(lists, cascade=cascade, **setting)
    assert expected != reranker.score_lists(of_wide, cascade=cascade, **setting)
    found = reranker.score_lists(of_narrow, cascade=cascade, **setting)
    for hits, others, query in zip(found, expected, QUERIES, strict=True):
        assert [hit["score"] for hit in hits] == pytest.approx([hit["score"] for hit in others], abs=2e-6)
        ranking = by_id(reranker.rank(query, ids=IDS, store=narrow.path, cascade=cascade))
        assert [ranking[name]["score"] for name in IDS] == pytest.approx([hit["score"] for hit in hits], abs=2e-6)


def test_scores_of_states_in_int8_are_near_those_of_the_states_as_computed(reranker, tmp_path):
    near, far = [], []
    for ratio in (1, 4):
        setting = {"store_layer": 2, "compress_ratio": ratio}
        wide, own = (
            by_id(reranker.rank(QUERIES[0], ids=IDS, store=reranker.store(TEXTS, tmp_path / name, **setting, **more)))
            for name, more in ((f"{ratio}", {}), (f"{ratio}-int8", {"state_quantization": "int8"}))
        )
        near += [abs(own[name]["score"] - wide[name]["score"]) for name in IDS]
        far += [abs(wide[name]["score"] - wide["empty"]["score"]) for name in IDS]
    assert 0 < max(near) < 0.05 * max(far)


def test_beside_states_in_int8_those_of_texts_are_rounded_too(mistral, tmp_path):
    few = {name: TEXTS[name] for name in IDS[::3]}
    options = {"store_layer": 3, "compress_ratio": 4, "state_quantization": "int8"}
    stored = mistral.store(few, tmp_path / "few", **options), mistral.store(TEXTS, tmp_path / "all", **options)
    mixed, whole = (mistral.rank(QUERIES[0], list(TEXTS.values()), ids=IDS, store=store) for store in stored)
    assert len(stored[0]) == len(few)
    same(mixed, [{name: value for name, value in hit.items() if name != "id"} for hit in whole])


def test_a_store_in_another_format_is_refused_by_name(mistral, tmp_path):
    setting = {"store_layer": 3, "compress_ratio": 4}
    for name, method, other in (("wide", None, "int8"), ("narrow", "int8", None)):
        mistral.store(TEXTS, tmp_path / name, **setting, state_quantization=method)
        with pytest.raises(ValueError, match=f"made with state_quantization={method!r}, and not {other!r}"):
            mistral.store({"new": "heat"}, tmp_path / name, **setting, state_quantization=other)
        assert "new" not in PassageStore(tmp_path / name)
    with pytest.raises(ValueError, match="state_quantization is 'int4', but must be 'int8', or None"):
        mistral.store(TEXTS, tmp_path / "other", **setting, state_quantization="int4")
    assert not (tmp_path / "other").exists()
    lists = [mistral.stored_pairs(QUERIES[0], IDS[:2], tmp_path / name) for name in ("wide", "narrow")]
    with pytest.raises(ValueError, match=r"pair 2 has a passage stored in torch.int8, and pair 0 in torch.float32"):
        mistral.score_lists(lists, **setting)


def test_a_store_says_its_format_and_its_shards_must_have_it(mistral, tmp_path):
    setting = {"store_layer": 3, "compress_ratio": 4}
    for name, method in (("wide", None), ("narrow", "int8")):
        path = tmp_path / name
        mistral.store(TEXTS, path, **setting, state_quantization=method)
        expected = mistral.rank(QUERIES[0], ids=IDS, store=path)
        noted = json.loads((path / "store.json").read_text())
        assert noted.pop("state_quantization") == method
        (path / "store.json").write_text(json.dumps(noted))  # as it was before there was a choice
        if method is None:
            assert mistral.rank(QUERIES[0], ids=IDS, store=path) == expected
        else:
            with pytest.raises(ValueError, match=r"00000.safetensors has states in I8, but .*state_quantization=None"):
                mistral.rank(QUERIES[0], ids=IDS, store=path)
        for wrong in ("int4", 8, False, ["int8"]):
            (path / "store.json").write_text(json.dumps(noted | {"state_quantization": wrong}))
            with pytest.raises(ValueError, match=r"store.json cannot be read: state_quantization is .*'int8', or None"):
                PassageStore(path)
    (tmp_path / "wide/store.json").write_text(json.dumps(noted | {"state_quantization": "int8"}))
    with pytest.raises(ValueError, match=r"00000.safetensors has states in F32, but .*state_quantization='int8'"):
        mistral.rank(QUERIES[0], ids=IDS, store=tmp_path / "wide")
