"""One pass through a layer-wise model. Loading and saving: test_decoder_loading.py."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.nn import functional as F
from transformers.models.mistral.modeling_mistral import MistralAttention

from tests.batches import EXITS, LENGTHS, WIDTHS, close, collate, random_sequences, scores, slow_scores

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_WIDTH = pytest.mark.parametrize("width", WIDTHS)
SEQUENCES = random_sequences(LENGTHS)
PART_LENGTHS = st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 4)).filter(sum)


@pytest.fixture
def own_model(layerwise_model):
    """A copy that a test may change."""
    return copy.deepcopy(layerwise_model)


def gradients(loss, model):
    """Of all parameters that have one, by name."""
    named = dict(model.named_parameters())
    values = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {name: value for name, value in zip(named, values, strict=True) if value is not None}


# Scores


@given(
    lengths=st.lists(PART_LENGTHS, min_size=1, max_size=5),
    cutoff_layers=st.lists(st.sampled_from(EXITS), min_size=1, unique=True),
    compress_layers=st.lists(st.integers(1, 6), min_size=1, unique=True),
    compress_ratio=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_a_batch_scores_as_transformers_layers_on_one_sequence_at_a_time(
    layerwise_model, plain_model, lengths, seed, **setting
):
    sequences = random_sequences(lengths, seed)
    with torch.no_grad():
        expected = [slow_scores(plain_model, layerwise_model.lm_head, each, **setting) for each in sequences]
        close(scores(layerwise_model, sequences, **setting), torch.stack(expected, 1))


@torch.no_grad()
@EVERY_WIDTH
def test_a_row_scores_the_same_alone_and_in_any_batch(layerwise_model, width):
    expected = torch.cat([scores(layerwise_model, [sequence], **width) for sequence in SEQUENCES], 1)
    close(scores(layerwise_model, SEQUENCES, **width), expected)
    close(scores(layerwise_model, SEQUENCES, extra=5, **width), expected)
    close(scores(layerwise_model, SEQUENCES, side="left", extra=1, **width), expected)
    close(scores(layerwise_model, SEQUENCES[::-1], **width), expected.flip(1))
    close(scores(layerwise_model, SEQUENCES[:3] * 2, side="left", **width), expected[:, :3].repeat(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_full_width_is_transformers_own_mistral(layerwise_model, plain_model, attention):
    plain = copy.deepcopy(plain_model)
    plain.set_attn_implementation(attention)
    batch = collate(SEQUENCES)
    states = plain(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    last = batch["attention_mask"].sum(1) - 1
    for layer, actual in zip(EXITS, scores(layerwise_model, SEQUENCES), strict=True):
        state = states[layer][range(len(last)), last]
        normed = state if layer == EXITS[-1] else plain.model.norm(state)  # transformers norms its last state itself
        close(actual, layerwise_model.lm_head[EXITS.index(layer)](normed))


@torch.no_grad()
@EVERY_WIDTH
@pytest.mark.parametrize("cutoff_layers", [(6, 2, 4), (3,), (5, 4), EXITS[::-1]])
def test_some_exits_score_as_among_all_and_in_the_order_asked_for(layerwise_model, width, cutoff_layers):
    of_layer = dict(zip(EXITS, scores(layerwise_model, SEQUENCES, **width), strict=True))
    # A compress layer at the last exit or above has nothing to do, and exits are read before compression.
    expected = torch.stack([of_layer[layer] for layer in cutoff_layers])
    close(scores(layerwise_model, SEQUENCES, cutoff_layers=cutoff_layers, **width), expected)


@torch.no_grad()
def test_an_int_is_a_list_of_one_and_none_the_deepest(layerwise_model):
    batch = collate(SEQUENCES)
    compressed = {"compress_ratio": 2, "cutoff_layers": 6}
    (expected,) = layerwise_model(**batch, compress_layers=[2], **compressed).logits
    assert not torch.allclose(expected, layerwise_model(**batch).logits[0], atol=1e-2)
    close(layerwise_model(**batch).logits[0], scores(layerwise_model, SEQUENCES)[-1], 1e-6)
    for spelling in ({"compress_layers": 2}, {"compress_layer": 2}, {"compress_layer": [2], "compress_layers": 2}):
        close(layerwise_model(**batch, **spelling, **compressed).logits[0], expected, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("depth", [2, 4, 5])
def test_nothing_above_the_last_cutoff_runs(layerwise_model, own_model, depth):
    for layer in own_model.model.layers[depth:]:
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    cutoffs = range(2, depth + 1)
    request = {"cutoff_layers": cutoffs, "compress_layers": [1, depth, 6], "compress_ratio": 2}
    close(scores(own_model, SEQUENCES, **request), scores(layerwise_model, SEQUENCES, **request), 1e-6)
    assert scores(own_model, SEQUENCES, cutoff_layers=6).isnan().all()


@torch.no_grad()
@EVERY_WIDTH
def test_bfloat16_is_close_and_scores_in_float32(layerwise_model, own_model, width):
    expected = scores(layerwise_model, SEQUENCES, **width)
    actual = scores(own_model.bfloat16(), SEQUENCES, **width)
    assert actual.dtype == torch.float32
    # about six layers' worth of roundings to 8 bits
    assert (actual - expected).abs().mean() < 0.02 * expected.std()


# Gradients


@EVERY_WIDTH
def test_gradients_equal_those_of_transformers_layers(layerwise_model, plain_model, width):
    actual = gradients(scores(layerwise_model, SEQUENCES, **width).square().mean(), layerwise_model)
    slow = torch.stack([slow_scores(plain_model, layerwise_model.lm_head, each, **width) for each in SEQUENCES], 1)
    both = nn.ModuleDict({"model": plain_model.model, "lm_head": layerwise_model.lm_head})
    expected = gradients(slow.square().mean(), both)
    assert actual.keys() == expected.keys() == dict(layerwise_model.named_parameters()).keys()
    for name, gradient in actual.items():
        assert gradient.isfinite().all() and gradient.any(), name
        close(gradient, expected[name], 1e-5 * max(1, float(expected[name].abs().max())))


@EVERY_WIDTH
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(layerwise_model, own_model, width, use_reentrant):
    expected = gradients(scores(layerwise_model, SEQUENCES, **width).square().mean(), layerwise_model)
    runs = []
    own_model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    own_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    own_model.enable_input_require_grads()
    own_model.train()
    scores(own_model, SEQUENCES, **width).square().mean().backward()
    assert len(runs) == 2, "a checkpointed layer runs again in the backward pass"
    for name, parameter in own_model.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.parametrize("layers", [[3], [2, 4], [4]])
def test_the_full_width_comes_along_without_a_graph_and_no_layer_runs_twice_in_vain(layerwise_model, own_model, layers):
    runs = [0] * 6
    for depth, layer in enumerate(own_model.model.layers):
        layer.register_forward_hook(lambda *_, depth=depth: runs.__setitem__(depth, runs[depth] + 1))
    width = {"compress_layers": layers, "compress_ratio": 4}
    outputs = own_model(**collate(SEQUENCES), cutoff_layers=[6, 2, 4], return_full_width=True, **width)
    assert runs == [1 if depth < layers[0] else 2 for depth in range(6)]
    close(torch.stack(outputs.logits), scores(layerwise_model, SEQUENCES, cutoff_layers=[6, 2, 4], **width))
    full_width = torch.stack(outputs.full_width_logits)
    assert not full_width.requires_grad
    close(full_width, scores(layerwise_model, SEQUENCES, cutoff_layers=[6, 2, 4]))
    assert layerwise_model(**collate(SEQUENCES), **width).full_width_logits is None


def test_without_compression_the_full_width_is_the_pass_itself(own_model):
    outputs = own_model(**collate(SEQUENCES), cutoff_layers=[4, 6], return_full_width=True)
    assert all(torch.equal(own, full) for own, full in zip(outputs.logits, outputs.full_width_logits, strict=True))


def test_scores_can_be_regressed_on(own_model):
    optimizer = torch.optim.AdamW(own_model.parameters(), lr=1e-2)
    target = torch.linspace(-1, 1, len(SEQUENCES))
    losses = []
    for _ in range(10):
        outputs = own_model(**collate(SEQUENCES), cutoff_layers=[3, 6], compress_layers=2, compress_ratio=2)
        loss = sum(F.mse_loss(logits, target) for logits in outputs.logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Outputs


@torch.no_grad()
def test_what_comes_out(layerwise_model):
    batch = collate(SEQUENCES, "left")
    outputs = layerwise_model(**batch, cutoff_layers=[6, 2])
    assert isinstance(outputs.logits, tuple) and len(outputs.logits) == 2
    assert all(logits.shape == (len(SEQUENCES),) and logits.dtype == torch.float32 for logits in outputs.logits)
    for absent in ("hidden_states", "attention_masks", "full_width_logits"):
        assert getattr(outputs, absent) is None
    as_tuple = layerwise_model(**batch, cutoff_layers=[6, 2], return_dict=False)
    assert isinstance(as_tuple, tuple)
    close(torch.stack(as_tuple[0]), torch.stack(outputs.logits), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_are_normalised_and_zero_where_padded(layerwise_model, plain_model, side):
    outputs = layerwise_model(
        **collate(SEQUENCES, side),
        cutoff_layers=[6, 2, 3],
        compress_layers=[2, 5],
        compress_ratio=4,
        output_hidden_states=True,
    )
    # layer 6 is behind two compressions, layer 2 before any, layer 3 behind one
    for layer, compressions, states, mask in zip(
        (6, 2, 3), (2, 0, 1), outputs.hidden_states, outputs.attention_masks, strict=True
    ):
        lengths = torch.tensor([query + -(-passage // 4**compressions) + prompt for query, passage, prompt in LENGTHS])
        assert mask.tolist() == (torch.arange(lengths.max()) < lengths[:, None]).long().tolist()
        assert states.shape == (*mask.shape, plain_model.config.hidden_size)
        assert not states[mask == 0].any()
        scale = states[mask == 1] / plain_model.model.norm.weight
        close(scale.square().mean(-1), torch.ones(int(mask.sum())), 1e-3)
        last = states[range(len(lengths)), lengths - 1]
        head = layerwise_model.lm_head[EXITS.index(layer)]
        close(head(last), outputs.logits[(6, 2, 3).index(layer)])


@torch.no_grad()
def test_full_width_hidden_states_are_those_of_transformers(layerwise_model, plain_model):
    batch = collate(SEQUENCES)
    (states,) = layerwise_model(**batch, output_hidden_states=True).hidden_states
    expected = plain_model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    close(states, expected * batch["attention_mask"][..., None])


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff_layers": [3, 7]}, r"cutoff_layers \[7\] have no head.* exits are \[2, 3, 4, 5, 6\]"),
        ({"compress_layers": 7, "compress_ratio": 2}, r"compress_layers \[7\] do not exist.* from 1 to 6"),
        ({"compress_ratio": 4}, r"compress_ratio=4 needs compress_layers"),
        ({"compress_layer": 2, "compress_layers": [3]}, r"compress_layer 2 and compress_layers \[3\] contradict"),
        (
            {"compress_layers": 2, "compress_ratio": 2, "query_lengths": None, "prompt_lengths": None},
            r"Compression needs query_lengths and prompt_lengths",
        ),
        (
            {"query_lengths": [1]},
            rf"query_lengths must hold one length for each of the {len(LENGTHS)} rows, got \(1,\)",
        ),
        ({"input_ids": None}, r"needs input_ids"),
        ({"labels": torch.zeros(6)}, r"no use for \['labels'\]"),
        ({"use_cache": True, "past_key_values": ()}, r"no use for \['use_cache', 'past_key_values'\]"),
    ],
)
def test_what_does_not_fit_is_refused(layerwise_model, changes, message):
    with pytest.raises(ValueError, match=message):
        layerwise_model(**collate(SEQUENCES) | changes)


def test_arguments_that_ask_for_nothing_are_no_mistake(layerwise_model):
    layerwise_model(**collate(SEQUENCES), labels=None, inputs_embeds=None, use_cache=False, output_attentions=False)


def test_attention_that_is_not_causal_is_refused_when_a_model_is_made(own_model, monkeypatch):
    make = MistralAttention.__init__

    def make_not_causal(attention, **arguments):
        make(attention, **arguments)
        attention.is_causal = False

    monkeypatch.setattr(MistralAttention, "__init__", make_not_causal)
    with pytest.raises(ValueError, match=r"attention in MistralAttention is not causal: sequences cannot be packed"):
        type(own_model)(own_model.config)


@torch.no_grad()
def test_a_sequence_may_have_all_positions_of_the_model_but_not_more(layerwise_model, own_model):
    longest = max(map(sum, LENGTHS))
    own_model.config.max_position_embeddings = own_model.model.max_positions = longest
    close(scores(own_model, SEQUENCES), scores(layerwise_model, SEQUENCES), 1e-6)
    own_model.config.max_position_embeddings = own_model.model.max_positions = longest - 1
    message = rf"row 3 has {longest} tokens, more than max_position_embeddings={longest - 1}\. Use a smaller max_length"
    with pytest.raises(ValueError, match=message):
        scores(own_model, SEQUENCES)
