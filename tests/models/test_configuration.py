import pytest
from transformers import AutoConfig

from flagembedding_matryoshka import CostWiseMistralConfig, CostWiseMistralForCausalLM, CostWiseMistralModel, Setting
from flagembedding_matryoshka.setting import resolve_alias


def config(**kwargs):
    return CostWiseMistralConfig(**{"num_hidden_layers": 8, "layer_wise": True, "start_layer": 2} | kwargs)


@pytest.mark.parametrize(
    ("start_layer", "layer_sep", "exits"),
    [(2, 1, [2, 3, 4, 5, 6, 7, 8]), (2, 4, [2, 6]), (1, 7, [1, 8]), (8, 1, [8]), (3, 100, [3])],
)
def test_exits_start_at_start_layer_and_end_with_the_layers(start_layer, layer_sep, exits):
    assert config(start_layer=start_layer, layer_sep=layer_sep).exit_layers == exits


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start_layer": 0}, r"start_layer is 0, but must lie in 1 to num_hidden_layers=8"),
        ({"start_layer": 9}, r"start_layer is 9, but must lie in 1 to num_hidden_layers=8"),
        ({"layer_sep": 0}, r"layer_sep is 0, but must be at least 1"),
    ],
)
def test_no_exits_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Setting.resolve(config(**values))


def test_a_configuration_survives_saving(tmp_path):
    saved = config(start_layer=3, layer_sep=2, head_token_id=17, raw_peft=["a", "b"])
    saved.save_pretrained(tmp_path)
    for cls in (CostWiseMistralConfig, AutoConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is CostWiseMistralConfig
        assert loaded.to_dict() | {"_name_or_path": ""} == saved.to_dict()
        assert (loaded.layer_wise, loaded.exit_layers, loaded.head_token_id) == (True, [3, 5, 7], 17)
        assert list(loaded.raw_peft) == ["a", "b"]


def test_remote_code_is_forgotten():
    assert "auto_map" not in config(auto_map={"AutoConfig": "modeling.Config"}).to_dict()


def test_the_whole_model_is_the_default():
    setting = Setting.resolve(config(layer_sep=4))
    assert setting == Setting(cutoff_layers=(6,), compress_layers=(), compress_ratio=1)
    assert setting.depth == 6


def test_one_layer_may_be_an_int():
    assert Setting.resolve(config(), 3, 2, 4) == Setting.resolve(config(), [3], [2], 4)


def test_cutoffs_keep_their_order_and_compress_layers_are_a_set():
    setting = Setting.resolve(config(), [6, 2, 4], range(7, 0, -3), 2)
    assert setting.cutoff_layers == (6, 2, 4)
    assert setting == Setting.resolve(config(), (6, 2, 4), [1, 4, 7, 4], 2)


def test_compression_happens_below_the_last_exit_alone():
    setting = Setting.resolve(config(), [5, 3], [1, 3, 5, 8], 2)
    assert [layer for layer in range(9) if setting.compresses_after(layer)] == [1, 3]
    full_width = Setting.resolve(config(), 5, [1, 3], 1)
    assert not any(map(full_width.compresses_after, range(9)))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"cutoff_layers": [4, 9, 1]}, r"cutoff_layers \[9, 1\] have no head.* exits are \[2, 3, 4, 5, 6, 7, 8\]"),
        ({"cutoff_layers": 0}, r"cutoff_layers \[0\] have no head"),
        ({"cutoff_layers": []}, r"cutoff_layers is empty.* exits are \[2, 3, 4, 5, 6, 7, 8\]"),
        ({"compress_layers": 0, "compress_ratio": 2}, r"compress_layers \[0\] do not exist.* from 1 to 8"),
        ({"compress_layers": [2, 9, -1]}, r"compress_layers \[-1, 9\] do not exist.* from 1 to 8"),
        ({"compress_layers": 2, "compress_ratio": 3}, r"compress_ratio is 3, but must be one of \[1, 2, 4, 8\]"),
        ({"compress_layers": 2, "compress_ratio": 0}, r"compress_ratio is 0, but must be one of"),
        ({"compress_layers": 2, "compress_ratio": True}, r"compress_ratio is True, but must be one of"),
        ({"compress_layers": 2, "compress_ratio": "2"}, r"compress_ratio is '2', but must be one of"),
        ({"compress_ratio": 2}, r"compress_ratio=2 needs compress_layers"),
        ({"compress_layers": [], "compress_ratio": 2}, r"compress_ratio=2 needs compress_layers"),
    ],
)
def test_what_does_not_exist_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        Setting.resolve(config(), **request_)


@pytest.mark.parametrize("name", ["cutoff_layers", "compress_layers"])
@pytest.mark.parametrize(
    ("layers", "value"), [([2, "4"], "'4'"), ("4", "'4'"), ([2.0], "2.0"), (2.0, "2.0"), (True, "True")]
)
def test_what_is_not_an_int_is_refused(name, layers, value):
    with pytest.raises(TypeError, match=f"{name} must be an int or a list of ints, got {value}"):
        Setting.resolve(config(), **{name: layers})


@pytest.mark.parametrize("model_class", [CostWiseMistralModel, CostWiseMistralForCausalLM])
def test_a_model_leaves_the_configuration_that_it_is_made_of_alone(model_class):
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    given = config(num_key_value_heads=1, tie_word_embeddings=True, **small)
    before, attention = given.to_dict(), given._attn_implementation
    model = model_class(given)
    assert model.config is not given and model.config._attn_implementation == "cost_wise_packed"
    assert (given.to_dict(), given._attn_implementation) == (before, attention)


def test_compress_layers_have_one_value_under_two_names():
    assert resolve_alias(None, None) is None
    assert resolve_alias([2, 4], None) == resolve_alias(None, [2, 4]) == [2, 4]
    assert resolve_alias(2, [2]) == [2]
    with pytest.raises(ValueError, match=r"compress_layer 2 and compress_layers \[3\] contradict"):
        resolve_alias(2, [3])
    with pytest.raises(TypeError, match="compress_layer must be an int or a list of ints, got 'x'"):
        resolve_alias("x", 2)
