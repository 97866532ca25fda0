import ast
import importlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BloomModel, MistralConfig, MistralForCausalLM, MistralModel, PreTrainedModel

import flagembedding_matryoshka
from flagembedding_matryoshka.models.backbones import CostWiseMistralForCausalLM
from flagembedding_matryoshka.private import (
    OVERRIDDEN,
    BackboneAttention,
    adapters_of,
    attention_of,
    compiler_options,
    find_file,
    get_whole_modules,
    has_vnni,
    ignore_on_load,
    int8_product,
    onednn_linear,
    onednn_order,
    save_under_own_names,
    selected_rows,
    takes_attention_from_interface,
    tree_flatten,
    tree_unflatten,
    untie_weights,
    version_of,
)

PACKAGE = Path(flagembedding_matryoshka.__file__).parent
STANDARD_LIBRARY = {"_replace", "_ArgumentGroup", "_AppendAction", "_actions", "_children", "_getframe"}
OF_AN_ADAPTER = {"integrations/mteb.py: mteb._create_dataloaders"}


def private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def test_no_other_module_uses_a_private_name_of_a_library():
    trees = {
        path.relative_to(PACKAGE).as_posix(): list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    own = set(STANDARD_LIBRARY).union(*OVERRIDDEN.values())
    for path, nodes in trees.items():
        if path != "private.py":
            own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")}
            # Only of `self`: an attribute that is set on another object may be the library's.
            stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
            own |= {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
    library = {name for names in (vars(PreTrainedModel), vars(MistralModel)) for name in names if private(name)}
    own -= library - set().union(*OVERRIDDEN.values())
    found = set()
    for path, nodes in trees.items():
        for node in nodes if path != "private.py" else ():
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
                found.add(f"{path}: {node.attr}")
            if isinstance(node, ast.ImportFrom) and any(map(private, (node.module or "").split("."))):
                found.add(f"{path}: {node.module}")
            if isinstance(node, ast.keyword) and node.arg and private(node.arg) and node.arg != "_internal_call":
                found.add(f"{path}: {node.arg}")
    assert found == OF_AN_ADAPTER


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in OVERRIDDEN.items() for name in names])
def test_the_library_has_the_names_that_subclasses_override(place, name):
    module, _, kind = place.rpartition(".")
    assert hasattr(getattr(importlib.import_module(module), kind), name)


def test_the_package_uses_each_of_these_names():
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py") if path.name != "private.py")
    for names in OVERRIDDEN.values():
        for name in names:
            assert re.search(rf"(def |\.){name}\b", text), name


def test_attention_of_a_class_without_source_is_that_of_its_backbone():
    assert takes_attention_from_interface(MistralModel) and not takes_attention_from_interface(BloomModel)
    for backbone in (MistralModel, BloomModel):
        own = type("Own", (BackboneAttention, backbone), {"__module__": "of_a_notebook"})
        assert takes_attention_from_interface(own) == takes_attention_from_interface(backbone)


def test_a_model_says_which_attention_it_uses():
    model = MistralModel(MistralConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        assert attention_of(model) == name


def test_leaves_of_a_tree_make_the_tree_again():
    tree = (1, [2, {"three": 3}], None)
    leaves, structure = tree_flatten(tree)
    assert leaves[:3] == [1, 2, 3] and tree_unflatten(leaves, structure) == tree


def test_a_decoder_layer_is_never_split(layerwise_model):
    layer = type(layerwise_model.model.layers[0]).__name__
    assert get_whole_modules(layerwise_model) == get_whole_modules(layerwise_model.model) == {layer}
    assert hasattr(PreTrainedModel, "_no_split_modules") and get_whole_modules(PreTrainedModel) == set()


def test_heads_are_float32_in_any_dtype(tiny_layerwise_path):
    model = CostWiseMistralForCausalLM.from_pretrained(tiny_layerwise_path, dtype=torch.bfloat16)
    assert model.lm_head[0].linear_head.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_weights_of_layers_that_are_left_out_are_ignored(tiny_raw_model_path):
    class Lower(MistralForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            ignore_on_load(self, [r"^model\.layers\.[1-9]"])

    config = MistralConfig.from_pretrained(tiny_raw_model_path, num_hidden_layers=1)
    for model_class, is_ignored in ((MistralForCausalLM, False), (Lower, True)):
        _, info = model_class.from_pretrained(tiny_raw_model_path, config=config, output_loading_info=True)
        assert (not info["unexpected_keys"]) == is_ignored


def test_untied_weights_stay_apart():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = MistralConfig(**sizes, num_key_value_heads=1, vocab_size=9, tie_word_embeddings=True)
    for is_untied in (False, True):
        model = MistralForCausalLM(config)
        if is_untied:
            untie_weights(model)
            model.lm_head = nn.Linear(8, 9, bias=False)
        model.tie_weights()
        assert (model.lm_head.weight is model.get_input_embeddings().weight) != is_untied


def test_weights_are_saved_under_the_names_of_the_model(tiny_raw_model_path, tmp_path):
    weights = load_file(tiny_raw_model_path / "model.safetensors")
    weights["head.weight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    MistralConfig.from_pretrained(tiny_raw_model_path).save_pretrained(tmp_path)
    model = MistralForCausalLM.from_pretrained(tmp_path, key_mapping={r"^head\.": "lm_head."})
    model.save_pretrained(tmp_path / "former")
    save_under_own_names(model)
    model.save_pretrained(tmp_path / "own")
    names = [set(load_file(tmp_path / name / "model.safetensors")) for name in ("former", "own")]
    assert "head.weight" in names[0] and "lm_head.weight" in names[1]


def test_a_missing_file_of_a_checkpoint_is_none(tiny_raw_model_path):
    assert find_file(tiny_raw_model_path, "config.json") == str(tiny_raw_model_path / "config.json")
    assert find_file(tiny_raw_model_path, "missing.json") is None
    with pytest.raises(OSError, match="missing_folder"):
        find_file(tiny_raw_model_path / "missing_folder", "config.json")


def test_adapters_of_a_layer():
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    assert adapters_of(model.base_model.model[0]) == {"default", "other"}


def test_selected_rows_of_a_data_set():
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    assert selected_rows(rows) is None
    assert selected_rows(rows.select([2, 0])).to_pylist() == [2, 0]


def test_compiler_options_hold_inside():
    before = torch._dynamo.config.recompile_limit
    with compiler_options({"recompile_limit": before + 1}):
        assert torch._dynamo.config.recompile_limit == before + 1
    assert torch._dynamo.config.recompile_limit == before


def test_the_linear_layer_of_onednn_takes_a_weight_in_either_order_and_an_operation_after_it():
    states, weight, bias = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4)
    factor = torch.randn(5, 4)
    for given in (weight, onednn_order(weight, None)):
        for added in (bias, None):
            product = nn.functional.linear(states, weight, added)
            close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
            close(onednn_linear(states, given, added, "none", [], ""), product)
            close(onednn_linear(states, given, added, "swish", [], ""), nn.functional.silu(product))
            close(onednn_linear.binary(states, factor, given, added, "mul"), product * factor)


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_the_product_of_integers_is_exact(rows):
    generator = torch.Generator().manual_seed(rows)
    states, weight = (torch.randint(-127, 128, (size, 24), generator=generator).to(torch.int8) for size in (rows, 10))
    assert torch.equal(int8_product(states, weight.t()), states.int() @ weight.int().t())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_instructions_for_products_of_integers_are_those_that_the_kernel_names():
    assert has_vnni() == ("avx512_vnni" in Path("/proc/cpuinfo").read_text().split())


def test_a_change_in_place_is_counted():
    tensor = torch.zeros(3)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
