"""The order of copies and kernels, checked without a GPU: on torch's meta device, which computes nothing."""

import copy
from dataclasses import replace
from functools import partial
from queue import SimpleQueue

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mistral.modeling_mistral import MistralMLP

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import cascade, engine, scoring
from flagembedding_matryoshka.inference.engine import Engine
from flagembedding_matryoshka.inference.inputs import Passage
from flagembedding_matryoshka.inference.options import Call, ScoringOptions
from flagembedding_matryoshka.models import attention, flash
from flagembedding_matryoshka.models.batch import pack_pairs
from flagembedding_matryoshka.models.onednn import HAS_ONEDNN, OneDnnLinear, OneDnnMlp
from flagembedding_matryoshka.setting import Setting
from tests.batches import ImmediateExecutor

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [("a wing", f"passage {number} " * number) for number in range(8)]
GPU = torch.device("cuda")


class Recorder(TorchDispatchMode):
    """Notes copies from the host to the meta device, and what waits for a device."""

    def __init__(self):
        super().__init__()
        self.copies, self.waits = [], []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        is_meta = any(isinstance(value, torch.Tensor) and value.is_meta for value in arguments)
        name = function.overloadpacket.__name__
        if name == "_to_copy" and not is_meta and torch.device(options.get("device") or "cpu").type == "meta":
            self.copies.append(bool(options.get("non_blocking")))
        if name == "copy_" and arguments[0].is_meta and not arguments[1].is_meta:
            self.copies.append(bool((*arguments, options.get("non_blocking"))[2]))
        if is_meta and name in ("_local_scalar_dense", "nonzero"):
            self.waits.append(name)
        return function(*arguments, **options)


class AsGpu(TorchFunctionMode):
    """Lets the meta device stand in for a GPU: memory that is asked to be pinned is noted, and copies to "cuda".

    Attributes:
        copies: for each copy, whether it asks not to block and its source is all of a pinned buffer.
        buffers: the pinned buffers.
        written: for each pinned buffer, by its address, the addresses of the tensors that are concatenated in it.
    """

    def __init__(self):
        super().__init__()
        self.copies, self.buffers, self.written = [], [], {}

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function is torch.empty and options.pop("pin_memory", False):
            buffer = torch.empty(*arguments, **options)
            self.buffers.append(buffer)
            self.written[buffer.data_ptr()] = []
            return buffer
        if function is torch.cat and "out" in options:
            self.written[options["out"].data_ptr()] += [one.data_ptr() for one in arguments[0]]
        if function is torch.Tensor.to and GPU in arguments:
            is_pinned = any(arguments[0] is buffer for buffer in self.buffers)
            self.copies.append(bool(options.get("non_blocking")) and is_pinned)
            arguments = tuple("meta" if one == GPU else one for one in arguments)
        if options.get("device") == GPU:
            options["device"] = "meta"
        return function(*arguments, **options)


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


def flash_on_meta(queries, keys, values, cu_seqlens_q, cu_seqlens_k, *lengths, **options):
    """The shapes and devices of torch's kernel, which runs on a GPU alone."""
    assert queries.is_meta and keys.is_meta and cu_seqlens_q.is_meta and cu_seqlens_k.is_meta
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    return torch.empty_like(queries)


@pytest.mark.parametrize("kernel", ["groups", "flash"])
@pytest.mark.parametrize("template", ["queries first", "passages first"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(6),
        Setting((2, 4, 6)),
        Setting(6, (2, 4), 2),
        Setting((4, 6), store_layer=3),
        Setting((4, 6), (2, 5), 4, store_layer=2),
    ],
    ids=str,
)
def test_a_batch_is_one_copy_to_a_device_and_nothing_waits(reranker, setting, template, kernel, monkeypatch):
    if kernel == "flash":
        monkeypatch.setattr(attention, "runs_flash", lambda query: query.is_meta)
        monkeypatch.setattr(flash, "FLASH", flash_on_meta)
    model = copy.deepcopy(reranker.model).to("meta")
    inputs = reranker.tokenize(PAIRS)
    if template == "passages first":
        prompts = [(pair, ids) for pair in inputs for ids in (pair.prompt_ids, pair.prompt_ids[1:])]
        inputs = [replace(pair, passage_first=True, prompt_ids=ids) for pair, ids in prompts]
    with Recorder() as recorder, torch.no_grad():
        states = model.model.embed(*pack_pairs(inputs, torch.device("meta")), setting)
        scores = model.scores(states, setting)
    assert scores.shape == (len(setting.cutoff_layers), len(inputs)) and scores.is_meta
    assert recorder.copies == [True] and not recorder.waits


@pytest.fixture(params=[None, "int8"])
def state_quantization(request):
    return request.param


@pytest.fixture(params=[Setting(6, store_layer=3), Setting((3, 6), (2, 4), 4, store_layer=2)], ids=str)
def stored(request, reranker, state_quantization, tmp_path):
    """A setting, and pairs of a query and passages that were stored with it."""
    setting = request.param
    width = {"compress_layers": setting.compress_layers, "compress_ratio": setting.compress_ratio}
    texts = {str(place): text for place, (_, text) in enumerate(PAIRS)}
    store = reranker.store(texts, tmp_path, setting.store_layer, state_quantization=state_quantization, **width)
    call = Call(reranker._pair_tokenizer, ScoringOptions.resolve(reranker, {}), setting)
    compute = partial(reranker._engine.passage_states, setting=setting)
    return setting, store.pairs("a wing", [Passage(name, None) for name in store], call, compute)


def test_stored_passages_are_one_more_copy(reranker, stored):
    setting, pairs = stored
    model = copy.deepcopy(reranker.model).to("meta")
    states = [pair.states for pair in pairs]
    with Recorder() as recorder, torch.no_grad():
        embedded = model.model.embed(*pack_pairs(pairs, torch.device("meta")), setting, states)
        assert model.scores(embedded, setting).shape == (len(setting.cutoff_layers), len(PAIRS))
    assert recorder.copies == [True, True] and not recorder.waits


def test_on_a_gpu_stored_passages_go_from_the_mapped_file_through_pinned_memory_before_the_first_layer(
    reranker, stored, state_quantization
):
    setting, pairs = stored
    model = copy.deepcopy(reranker.model).to("meta")
    states = [pair.states for pair in pairs]
    assert len({one.untyped_storage().data_ptr() for one in states}) == 1  # parts of one shard, not copies
    assert {one.dtype for one in states} == {torch.float32 if state_quantization is None else torch.int8}
    with AsGpu() as gpu, Recorder() as recorder, torch.no_grad():
        embedded = model.model.embed(*pack_pairs(pairs, GPU), setting, states)
        assert gpu.copies == recorder.copies == [True, True]
        model.scores(embedded, setting)
    assert gpu.copies == recorder.copies == [True, True] and not recorder.waits
    assert [one.data_ptr() for one in states] in gpu.written.values()


def test_a_later_stage_is_a_copy_of_what_is_selected_and_one_of_its_indices(reranker):
    setting = Setting(6, (2, 4), 2, ((3, 0.5),))
    model = copy.deepcopy(reranker.model).to("meta")
    with Recorder() as recorder, torch.no_grad():
        states = model.model.embed(*pack_pairs(reranker.tokenize(PAIRS), torch.device("meta")), setting)
        model.scores(states, setting, (3,))
        assert recorder.copies == [True]
        assert model.scores(states.select([5, 0, 2]), setting, (6,)).shape == (1, 3)
    assert recorder.copies == [True] * 3 and not recorder.waits


def recording(order, name):
    """A stand-in for `copy_to_host`: appends `name` to `order` when a copy is queued, and "wait" when it is read."""

    def copied(values):
        order.append(name)
        return lambda: order.append("wait") or values

    return copied


def test_the_first_stage_of_a_cascade_is_queued_before_the_scores_of_the_task_before_are_read(reranker, monkeypatch):
    queries, lists = ["a wing", "the heat", "air"], [[text for _, text in PAIRS]] * 3
    options = {"cascade": {2: 0.5}}
    monkeypatch.setattr(scoring, "BATCHES_AT_ONCE", 0)  # a task for each query
    expected = reranker.rank_batch(queries, lists, **options)
    order = []

    monkeypatch.setattr(cascade, "copy_to_host", recording(order, "queue"))
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    assert reranker.rank_batch(queries, lists, **options) == expected
    first, later = ["wait", "queue", "wait"], ["queue", "wait", "queue", "wait"]
    assert order == ["queue", "queue", *first, *later, *first]


def rank_one_by_one(reranker, queries, lists, **options):
    return list(reranker.rank_iter(queries, lists, **options))


@pytest.fixture
def small_windows(monkeypatch):
    """A window for each list, tokenised before it is needed."""
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_FIRST", 1)
    monkeypatch.setattr(scoring, "PAIRS_TOKENIZED_AHEAD", 1)
    monkeypatch.setattr(scoring, "ThreadPoolExecutor", ImmediateExecutor)


@pytest.mark.parametrize("rank", [MatryoshkaReranker.rank_batch, rank_one_by_one])
def test_the_next_windows_first_stage_is_queued_before_the_last_scores_are_read(
    reranker, rank, small_windows, monkeypatch
):
    queries, lists = ["a wing", "the heat", "air"], [[text for _, text in PAIRS]] * 3
    options = {"cascade": {2: 0.5}}
    expected = rank(reranker, queries, lists, **options)
    windows, order = [], []
    cut = scoring.tasks_of

    monkeypatch.setattr(scoring, "tasks_of", lambda window, call: windows.append(window) or cut(window, call))
    monkeypatch.setattr(cascade, "copy_to_host", recording(order, "queue"))
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    assert rank(reranker, queries, lists, **options) == expected
    assert [len(window.slices) for window in windows] == [1, 1, 1]
    first, later = ["wait", "queue", "wait"], ["queue", "wait", "queue", "wait"]
    assert order == ["queue", "queue", *first, *later, *first]


def test_batches_of_the_next_window_are_started_before_the_last_scores_are_read(reranker, small_windows, monkeypatch):
    queries, lists = ["a wing", "the heat", "air"], [["a", "b"]] * 3
    expected = reranker.rank_batch(queries, lists)
    order = []

    monkeypatch.setattr(engine, "copy_to_host", recording(order, "copy"))
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    assert reranker.rank_batch(queries, lists) == expected  # each list is cut into windows of one pair
    assert order == ["copy", *["copy", "wait"] * 5, "wait"]


def test_rankings_come_before_the_error_of_the_next_window(reranker, small_windows, monkeypatch):
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    rankings = reranker.rank_iter(["a wing", "the heat", "air", 7], [["a"]] * 4, cascade={2: 0.5})
    assert [len(next(rankings)) for _ in range(2)] == [1, 1]
    with pytest.raises(TypeError, match="query 3 must be a string, got 7"):
        next(rankings)


@pytest.mark.parametrize("documents", [["a", "b"], []])
def test_a_started_task_is_finished_if_the_input_has_nothing_yet(reranker, documents, monkeypatch):
    """The next query is there only after the ranking before it."""
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    asked = SimpleQueue()
    asked.put("a wing")
    rankings = reranker.rank_iter(iter(lambda: (asked.get(timeout=60), documents), None), cascade={2: 0.5})
    for query in ("the heat", "air", "a cone"):
        assert len(next(rankings)) == len(documents)
        asked.put(query)
    rankings.close()


def test_a_batchs_scores_are_copied_before_the_next_batch_is_started(reranker, monkeypatch):
    expected = reranker.compute_score(PAIRS, batch_size=2)
    order = []
    embed = Engine._embed

    monkeypatch.setattr(Engine, "_embed", lambda *given: order.append("run") or embed(*given))
    monkeypatch.setattr(engine, "copy_to_host", recording(order, "copy"))
    monkeypatch.setattr(reranker._engine, "_ahead", 1)
    assert reranker.compute_score(PAIRS, batch_size=2) == expected
    assert order == ["run", "copy", *["run", "copy", "wait"] * 3, "wait"]


@pytest.mark.skipif(not HAS_ONEDNN, reason="oneDNN is chosen on a processor with AVX-512")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_on_a_cpu_computes_by_onednn_and_its_model_is_exported(tiny_layerwise_path, dtype, tmp_path):
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype=dtype, devices="cpu")
    layers = reranker.model.model.layers
    linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    assert all(type(linear) is OneDnnLinear for linear in linears)
    assert all(type(layer.mlp) is OneDnnMlp for layer in layers)
    scores = reranker.compute_score(PAIRS)
    assert all(linear._packed is not None for linear in linears)
    plain = Engine(copy.deepcopy(reranker.model))  # as it was before it scored
    for linear in plain.model.model.layers.modules():
        if isinstance(linear, OneDnnLinear):
            linear.__class__ = torch.nn.Linear
    for layer in plain.model.model.layers:
        layer.mlp.__class__ = MistralMLP
    task = engine.Task([reranker.tokenize(PAIRS)], [range(len(PAIRS))], Setting(6))
    ((_, expected),) = plain.run([task])
    tolerance = {"float32": 1e-5, "bfloat16": 4e-2}[dtype]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected.scores[0]), atol=tolerance, rtol=0)
    reranker.export(tmp_path / "cut", cutoff_layers=[4, 6])
    exported = MatryoshkaReranker(str(tmp_path / "cut"), dtype=dtype, devices="cpu")
    assert exported.compute_score(PAIRS) == scores
