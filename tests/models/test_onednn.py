"""Products by oneDNN: the numbers of torch's layers, and torch's layers where they do not apply."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Glm4Config, LlamaConfig, MistralConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.glm4.modeling_glm4 import Glm4MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP

from flagembedding_matryoshka.models import onednn
from flagembedding_matryoshka.models.onednn import OneDnnLinear, OneDnnMlp, use_onednn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="oneDNN is chosen on a processor with AVX-512"),
]
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 5e-3}}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs of oneDNN's products."""
    shapes = []
    product = onednn.onednn_linear

    def noted(states, *others):
        shapes.append(tuple(states.shape))
        return product(states, *others)

    monkeypatch.setattr(onednn, "onednn_linear", noted)
    return shapes


def converted(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(24, 10, bias=bias, dtype=dtype)
    use_onednn(nn.Sequential(linear))
    assert type(linear) is OneDnnLinear and linear.packs
    return linear


def expected(linear, inputs):
    return nn.functional.linear(inputs, linear.weight, linear.bias)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (1, 33, 24), (2, 3, 5, 24), (0, 24)])
def test_without_a_gradient_the_product_is_that_of_torch(shape, bias, dtype, packs, calls):
    linear, inputs = converted(bias, dtype), torch.randn(shape).to(dtype)
    linear.packs = packs
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(linear(inputs), expected(linear, inputs), **CLOSE[dtype])
    assert calls == [shape] * 2


@pytest.mark.parametrize(
    "strided", [torch.randn(24, 7).t(), torch.randn(7, 48)[:, ::2], torch.randn(1, 24).expand(7, 24)]
)
def test_rows_may_have_any_strides(strided):
    linear = converted()
    with torch.no_grad():
        torch.testing.assert_close(linear(strided), expected(linear, strided), **CLOSE[torch.float32])


@pytest.mark.parametrize("learns", ["input", "weight", "bias", "all", "all without a bias"])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 24)])
def test_gradients_are_those_of_torch(shape, learns):
    linear = converted(learns != "all without a bias")
    given = {"input": torch.randn(shape), "weight": linear.weight, "bias": linear.bias}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        value.requires_grad_(learns == name or learns.startswith("all"))
    gradients = []
    for output in (linear(given["input"]), expected(linear, given["input"])):
        learnt = [value for value in given.values() if value.requires_grad]
        gradients.append(torch.autograd.grad(output.sin().sum(), learnt))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE[torch.float32])


def test_gradients_in_bfloat16_are_those_of_torch(calls):
    linear = converted(True, torch.bfloat16)
    linear(torch.randn(7, 24).bfloat16()).sum().backward()
    assert linear.weight.grad is not None and not calls


def test_under_autocast_the_layer_is_that_of_torch(calls):
    linear, inputs = converted(), torch.randn(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        for context in (torch.enable_grad, torch.no_grad):
            with context():
                assert linear(inputs).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_in_other_dtypes_the_layer_is_that_of_torch(dtype, calls):
    with torch.inference_mode():
        assert converted(True, dtype)(torch.randn(7, 24).to(dtype)).dtype == dtype
    assert not calls


@torch.no_grad()
def test_a_weight_that_changes_is_stored_anew():
    linear, inputs = converted(), torch.randn(7, 24)
    linear(inputs)
    for change in (
        lambda: linear.weight.mul_(2),
        lambda: linear.load_state_dict({"weight": torch.ones(10, 24), "bias": torch.zeros(10)}),
        lambda: setattr(linear, "weight", nn.Parameter(torch.randn(10, 24))),
    ):
        before = linear(inputs)
        change()
        torch.testing.assert_close(linear(inputs), expected(linear, inputs), **CLOSE[torch.float32])
        assert not torch.allclose(linear(inputs), before)


@torch.no_grad()
def test_a_weight_at_the_address_of_an_earlier_one_is_stored_anew():
    linear, inputs = converted(bias=False), torch.randn(7, 24)
    for _ in range(20):
        linear(inputs)
        for _ in range(2):  # the second one may get the memory of the one before the first
            linear.weight = nn.Parameter(torch.randn(10, 24))
        torch.testing.assert_close(linear(inputs), expected(linear, inputs), **CLOSE[torch.float32])


@torch.no_grad()
def test_a_used_layer_is_copied_saved_and_pickled_as_one_of_torch():
    linear, inputs = converted(), torch.randn(7, 24)
    output = linear(inputs)
    assert linear._packed is not None
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other._packed is None
        assert torch.equal(other(inputs), output)
    assert set(linear.state_dict()) == {"weight", "bias"}


def test_large_weights_are_not_stored_twice(monkeypatch):
    monkeypatch.setattr(onednn, "MOST_PACKED_BYTES", 24 * 10 * 4 - 1)
    linear = nn.Linear(24, 10)
    use_onednn(nn.Sequential(linear))
    with torch.inference_mode():
        torch.testing.assert_close(linear(torch.ones(2, 24)), expected(linear, torch.ones(2, 24)))
    assert type(linear) is OneDnnLinear and linear._packed is None


def test_other_processors_keep_the_layers_of_torch(monkeypatch):
    monkeypatch.setattr(onednn, "HAS_ONEDNN", False)
    layers = nn.Sequential(nn.Linear(24, 10), mlp(MistralMLP, MistralConfig))
    use_onednn(layers)
    assert not any(isinstance(part, OneDnnLinear | OneDnnMlp) for part in layers.modules())
    torch.testing.assert_close(onednn.product(torch.ones(2, 3), torch.ones(4, 3)), torch.full((2, 4), 3.0))


def mlp(kind, config, **options):
    torch.manual_seed(0)
    return kind(config(hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=2, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), [(MistralMLP, MistralConfig), (LlamaMLP, LlamaConfig)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_gated_by_silu_is_fused(kind, config, bias, dtype):
    options = {"mlp_bias": True} if bias and kind is LlamaMLP else {}
    plain = mlp(kind, config, **options).to(dtype)
    fused = copy.deepcopy(plain)
    use_onednn(nn.Sequential(fused))
    assert type(fused) is OneDnnMlp
    inputs = torch.randn(1, 9, 24).to(dtype)
    with torch.inference_mode():
        output = fused(inputs)
    torch.testing.assert_close(output, plain(inputs).detach(), **CLOSE[dtype])
    assert not torch.equal(output, torch.zeros_like(output))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_in_other_dtypes_a_fused_block_is_that_of_torch(dtype):
    plain = mlp(MistralMLP, MistralConfig).to(dtype)
    fused = copy.deepcopy(plain)
    use_onednn(nn.Sequential(fused))
    inputs = torch.randn(3, 24).to(dtype)
    with torch.inference_mode():
        assert torch.equal(fused(inputs), plain(inputs))


@torch.no_grad()
def test_a_layer_that_an_adapter_replaces_later_is_called_by_the_block():
    plain = mlp(MistralMLP, MistralConfig)
    fused = copy.deepcopy(plain)
    use_onednn(nn.Sequential(fused))
    for block in (plain, fused):
        block.gate_proj = nn.Sequential(block.gate_proj, nn.Tanh())
    inputs = torch.randn(3, 24)
    torch.testing.assert_close(fused(inputs), plain(inputs), **CLOSE[torch.float32])


def test_a_fused_block_passes_gradients():
    fused = mlp(MistralMLP, MistralConfig)
    use_onednn(nn.Sequential(fused))
    fused(torch.randn(3, 24)).sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in fused.parameters())


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (Gemma2MLP, Gemma2Config, {}),  # GELU
        (MistralMLP, MistralConfig, {"hidden_act": "relu"}),
        (Glm4MLP, Glm4Config, {}),  # gate and up in one matrix
    ],
)
def test_other_blocks_keep_their_forward(kind, config, options):
    plain = mlp(kind, config, **options)
    other = copy.deepcopy(plain)
    use_onednn(nn.Sequential(other))
    assert type(other) is kind
    inputs = torch.randn(5, 24)
    with torch.inference_mode():
        torch.testing.assert_close(other(inputs), plain(inputs).detach(), **CLOSE[torch.float32])


@torch.no_grad()
def test_operations_are_counted_as_those_of_torch():
    plain = mlp(MistralMLP, MistralConfig)
    fused = copy.deepcopy(plain)
    use_onednn(nn.Sequential(fused))
    counts = []
    for block in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(2, 5, 24))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 10 * 3 * 24 * 40


ALL_SIZES = """
import sys
import torch
from flagembedding_matryoshka.models.onednn import keep_few_products
if sys.argv[1] == "kept":
    keep_few_products()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
weights = [torch.ones(size, 32, dtype=torch.bfloat16) for size in (16, 32, 48, 64)]
rows = torch.ones(400, 32, dtype=torch.bfloat16)
before = resident()
with torch.inference_mode():
    for count in range(1, 400):
        for weight in weights:
            torch.nn.functional.linear(rows[:count], weight)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_batches_of_all_sizes_keep_the_code_of_few_products():
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}

    def grown(choice, **more):
        command = [sys.executable, "-c", ALL_SIZES, choice]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment | more).stdout)

    kept = grown("kept")
    # the code of a product is several times as large with AMX as without it
    assert 2 * kept < grown("as torch")
    assert 2 * kept < grown("kept", **dict.fromkeys(names, "1024"))
