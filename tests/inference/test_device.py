import warnings

import joblib
import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.device import (
    fast_batch_tokens,
    fast_dtype,
    follow_cpu_quota,
    resolve_dtype,
    threads_of_each,
)
from tests.batches import WIDTHS


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_cpu_gets_bfloat16_only_with_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype("cpu") == expected


@pytest.mark.parametrize(
    ("capabilities", "options", "warns"),
    [
        ({"avx2": True}, {"dtype": "bfloat16"}, True),
        ({"avx2": True}, {"use_bf16": True}, True),
        ({"avx2": True}, {}, False),
        ({"avx2": True}, {"dtype": "float16"}, False),
        ({"avx512_bf16": True}, {"dtype": "bfloat16"}, False),
    ],
)
def test_bfloat16_without_instructions_for_it_is_warned_of(
    monkeypatch, tiny_layerwise_path, capabilities, options, warns
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MatryoshkaReranker(str(tiny_layerwise_path), devices="cpu", **options)
    of_dtype = [
        warning for warning in caught if "bfloat16 is several times slower than float32" in str(warning.message)
    ]
    assert len(of_dtype) == warns
    assert not warns or of_dtype[0].filename == __file__


@pytest.mark.parametrize(
    ("dtype", "use_fp16", "use_bf16", "expected"),
    [
        ("float32", False, False, torch.float32),
        (torch.bfloat16, False, False, torch.bfloat16),
        ("auto", False, True, torch.bfloat16),
        ("bfloat16", False, True, torch.bfloat16),
    ],
)
def test_every_way_to_name_a_dtype(dtype, use_fp16, use_bf16, expected):
    assert resolve_dtype(dtype, use_fp16, use_bf16, "cpu") == expected


def test_half_precision_is_for_accelerators_as_in_flagembedding():
    assert resolve_dtype("auto", True, False, "cuda") == torch.float16
    assert resolve_dtype("auto", True, False, "cpu") == fast_dtype("cpu")
    assert resolve_dtype("float32", True, False, "cpu") == torch.float32
    assert resolve_dtype("float16", False, False, "cpu") == torch.float16


def test_contradicting_flags_are_refused():
    with pytest.raises(ValueError, match=r"use_fp16=True and use_bf16=True contradict"):
        resolve_dtype("auto", True, True, "cuda")
    with pytest.raises(ValueError, match=r"dtype='float32', use_fp16=True"):
        resolve_dtype("float32", True, False, "cuda")


@pytest.mark.parametrize("dtype", ["int8", "fp32", torch.int64])
def test_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"must be 'auto', 'float32'"):
        resolve_dtype(dtype, False, False, "cpu")


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "threads", "cache", "tokens"),
    [
        (torch.bfloat16, 512, 2, 2**20, 4096),
        (torch.bfloat16, 576, 2, 2**20, 4096),
        (torch.float32, 512, 2, 2**20, 4096),
        (torch.float32, 128, 2, 2**20, 4096),
        (torch.bfloat16, 128, 2, 2**20, 8192),
        (torch.bfloat16, 128, 1, 2**20, 4096),
        (torch.bfloat16, 256, 8, 2**21, 32_768),
        (torch.bfloat16, 128, 8, None, 32_768),
        (torch.float32, 4096, 2, 2**20, 4096),
        (torch.float32, 4096, 64, 2**20, 16_384),
        (torch.float32, 32, 128, 2**21, 65_536),
    ],
)
def test_batches_on_a_cpu_are_what_its_threads_compute_fast(dtype, hidden_size, threads, cache, tokens, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"l2_cache_size": cache} if cache else {})
    assert fast_batch_tokens("cpu", dtype, hidden_size, threads) == tokens


@pytest.mark.parametrize(
    ("devices", "threads"), [(["cpu"], 5), (["cpu", "cpu"], 2), (["cpu"] * 6, 1), (["cpu", "cuda:0"], 5), (["mps"], 5)]
)
def test_devices_share_the_threads_of_a_cpu(devices, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert threads_of_each(devices) == threads


@pytest.mark.parametrize("device", ["cuda:1", torch.device("mps")])
def test_batches_on_an_accelerator_are_as_large_in_memory_whatever_the_model(device):
    tokens = {width: fast_batch_tokens(device, torch.bfloat16, width, 2) for width in (64, 1024, 2048, 4096)}
    assert tokens == {64: 65_536, 1024: 65_536, 2048: 32_768, 4096: 16_384}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_gpu_scores_what_a_cpu_does_batch_after_batch(dtype, tolerance, width, tiny_layerwise_path):
    here = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
    there = MatryoshkaReranker(str(tiny_layerwise_path), dtype=dtype, devices="cuda", batch_size=3)
    pairs = [("a wing", "air flows over a wing " * (number % 5)) for number in range(11)]
    found, expected = (
        each.compute_score(pairs, cutoff_layers=each.config.exit_layers, **width) for each in (there, here)
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=tolerance, rtol=0)
    cascade = {3: 0.5}
    ranked, wanted = (each.rank("a wing", [text for _, text in pairs], cascade=cascade) for each in (there, here))
    assert sorted(item["cutoff_layer"] for item in ranked) == sorted(item["cutoff_layer"] for item in wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_compiled_scores_the_same_on_a_gpu(tiny_layerwise_path):
    plain, compiled = (
        MatryoshkaReranker(str(tiny_layerwise_path), dtype="bfloat16", devices="cuda", batch_size=3, compile=compile)
        for compile in (False, True)
    )
    pairs = [("a wing", "air flows over a wing " * (number % 5)) for number in range(11)]
    for width in WIDTHS:
        found, expected = (
            each.compute_score(pairs, cutoff_layers=each.config.exit_layers, **width) for each in (compiled, plain)
        )
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=0.2, rtol=0)


@pytest.mark.parametrize(("processors", "before", "after"), [(1, 8, 1), (4, 8, 4), (8, 8, 8), (16, 8, 8)])
def test_threads_follow_the_quota_and_are_never_more_than_before(processors, before, after, monkeypatch):
    threads = [before]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: processors)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    follow_cpu_quota()
    assert threads[-1] == after
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    threads.append(before)
    follow_cpu_quota()
    assert threads[-1] == before


def test_a_reranker_on_a_cpu_follows_the_quota(tiny_layerwise_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
