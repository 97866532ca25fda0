"""Passages that run apart from their queries up to a store layer."""

import copy
import inspect

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from flagembedding_matryoshka import Setting
from flagembedding_matryoshka.models.batch import pack_pairs
from flagembedding_matryoshka.models.flops import estimate_flops
from flagembedding_matryoshka.models.split import BLOCK, from_int8, split_passages, to_int8
from tests.backbones import BACKBONES, FIRST, layer_wise, let_heads_differ, write_raw
from tests.batches import EXITS, close, slow_compress, tokenized_pair

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# (store layer, exits, compress layers, ratio)
SETTINGS = [
    Setting((2, 4, 6), store_layer=1),
    Setting((6, 4), store_layer=3),
    Setting((6,), store_layer=5),
    Setting((3, 6), (2,), 2, store_layer=2),
    Setting((4, 5, 6), (3, 5), 4, store_layer=3),
    Setting((5, 6), (4,), 8, store_layer=1),
]
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=str)
QUERIES = [[11, 12, 13, 14, 15], [21, 22], [31]]
PROMPT = [201, 202, 203]
# (query, passage tokens, prompt): neighbours of one query, no passage, one token, no query, no prompt, another prompt
SHAPES = [
    (QUERIES[0], 17, PROMPT),
    (QUERIES[0], 0, PROMPT),
    (QUERIES[0], 30, PROMPT),
    (QUERIES[0], 4, PROMPT[:2]),
    (QUERIES[1], 1, PROMPT),
    ([], 13, []),
    (QUERIES[2], 9, []),
    (QUERIES[1], 12, PROMPT),
]


def passage(place, length):
    return [100 + (7 * place + token) % 90 for token in range(length)]


def pairs_of(shapes):
    return [
        tokenized_pair(query + passage(place, length) + prompt, len(query), len(prompt))
        for place, (query, length, prompt) in enumerate(shapes)
    ]


PAIRS = pairs_of(SHAPES)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in BACKBONES],
)
def backbone(request, tiny_tokenizer, tmp_path_factory):
    """A layer-wise model and transformers' own, of the same weights."""
    path = write_raw(request.param, tiny_tokenizer, tmp_path_factory.mktemp(request.param))
    model = layer_wise(path)
    let_heads_differ(model)
    return request.param, model, AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def run_layer(plain, index, hidden, positions, sees):
    """A layer of transformers with explicit positions (tokens,) and a mask (tokens, tokens), True where a token (row)
    sees another one (column); and its attention map. A window hides tokens whose position is too far back."""
    layer = plain.model.layers[index]
    layer_types = getattr(plain.config, "layer_types", None)
    is_sliding = layer_types is None or layer_types[index] == "sliding_attention"
    window = plain.config.sliding_window if is_sliding and hasattr(plain.config, "sliding_window") else None
    if window is not None:
        sees = sees & (positions[:, None] - positions < window)
    by_type = "layer_type" in inspect.signature(plain.model.rotary_emb.forward).parameters
    maps = []
    hook = layer.self_attn.register_forward_hook(lambda _module, _args, output: maps.append(output[1]))
    output = layer(
        hidden,
        attention_mask=torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None],
        position_embeddings=plain.model.rotary_emb(hidden, positions[None], *([layer_types[index]] if by_type else [])),
        position_ids=positions[None],
    )
    hook.remove()
    return output, maps[0]


def slow_scores(plain, heads, pair, setting, scale=1.0):
    """(exits,) scores of one pair: all layers of transformers over the whole pair, with the mask of a store layer."""
    query, passage = pair.query_length, pair.passage_length
    hidden = plain.model.embed_tokens(torch.tensor(pair.input_ids)[None].long()) * scale
    found = {}
    for depth in range(1, setting.depth + 1):
        length = hidden.shape[1]
        positions, sees = torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()
        if depth <= setting.store_layer:
            in_passage = (positions >= query) & (positions < query + passage)
            sees &= in_passage[:, None] == in_passage
            positions = torch.where(in_passage, positions - query, positions - passage * (positions >= query + passage))
        hidden, maps = run_layer(plain, depth - 1, hidden, positions, sees)
        if depth in setting.cutoff_layers:
            found[depth] = heads[EXITS.index(depth)](plain.model.norm(hidden[:, -1]))
        if setting.compresses_after(depth):
            row = torch.ones(length) if depth == setting.store_layer else maps[0, :, -1].sum(0)
            hidden = torch.stack(slow_compress(hidden[0], row, query, query + passage, setting.compress_ratio))[None]
            passage = -(-passage // setting.compress_ratio)
    return torch.cat([found[layer] for layer in setting.cutoff_layers])


def scores(model, pairs, setting, apart=False):
    """(exits, pairs)"""
    return model.scores(model.model.embed(*pack_pairs(pairs, CPU, apart), setting), setting)


@torch.no_grad()
@EVERY_SETTING
def test_a_batch_scores_as_transformers_layers_with_an_explicit_mask(backbone, setting):
    name, model, plain = backbone
    slow = [slow_scores(plain, model.lm_head, pair, setting, BACKBONES[name].embedding_scale) for pair in PAIRS]
    expected = BACKBONES[name].finish(torch.stack(slow, 1))
    assert expected.std() > 0.1
    close(scores(model, PAIRS, setting), expected, 5e-6)
    close(scores(model, PAIRS[::-1], setting), expected.flip(1), 5e-6)


@torch.no_grad()
def test_a_pair_scores_otherwise_than_without_the_mask(backbone):
    """The masks matter: another store layer is another score."""
    _, model, _ = backbone
    found = torch.stack([scores(model, PAIRS[:1], Setting(6, store_layer=layer))[0, 0] for layer in range(6)])
    assert (found[:, None] - found).abs().add(torch.eye(6)).min() > 1e-3


@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from([*QUERIES, []]), st.integers(0, 20), st.sampled_from([PROMPT, PROMPT[:1], []])
        ).filter(lambda shape: shape[1] + len(shape[2])),
        min_size=1,
        max_size=7,
    ),
    setting=st.sampled_from(SETTINGS),
    apart=st.booleans(),
)
@torch.no_grad()
def test_a_pair_scores_the_same_alone_and_in_any_batch(layerwise_model, shapes, setting, apart):
    pairs = pairs_of(shapes)
    alone = torch.cat([scores(layerwise_model, [pair], setting) for pair in pairs], 1)
    close(scores(layerwise_model, pairs, setting, apart), alone, 5e-6)


@torch.no_grad()
@EVERY_SETTING
def test_up_to_the_store_layer_query_and_passage_do_not_depend_on_one_another(layerwise_model, setting):
    """What is stored does not depend on the query, and what is computed for a query does not depend on the passage."""
    model, store = layerwise_model.model, setting.store_layer
    below = Setting(6, store_layer=store)

    def states(pair):
        embedded = model.embed(*pack_pairs([pair], CPU), below)
        *_, (depth, hidden, _) = model.run(embedded, below, store)
        assert depth == store
        return hidden[0].split([pair.query_length, pair.passage_length, pair.prompt_length])

    (first,) = pairs_of(SHAPES[:1])
    (other_query,) = pairs_of([(QUERIES[1], *SHAPES[0][1:])])
    (other_passage,) = pairs_of([(QUERIES[0], 9, PROMPT)])
    close(states(other_query)[1], states(first)[1], 1e-6)
    for place in (0, 2):
        close(states(other_passage)[place], states(first)[place], 1e-6)
    assert not torch.allclose(states(other_query)[2], states(first)[2], atol=1e-2)


def test_neighbours_of_one_query_run_it_once_with_their_prompt():
    token_ids, packed = pack_pairs(PAIRS, CPU)
    ids, split = split_passages(token_ids, packed)
    batch = split.batch
    parts = torch.stack([batch.query_lengths, batch.passage_lengths, batch.prompt_lengths], 1).tolist()
    # The first three pairs have one segment of query and prompt, the fourth pair has the same query but another prompt.
    fronts = [[5, 0, 3], [5, 0, 2], [2, 0, 3], [1, 0, 0], [2, 0, 3]]
    assert sorted(parts) == sorted(fronts + [[0, length, 0] for _, length, _ in SHAPES if length])
    assert batch.prefixes is None
    assert torch.equal(split.join(ids[..., None], packed)[..., 0], token_ids)


def test_training_has_the_gradients_of_transformers_layers(backbone):
    name, model, plain = backbone
    setting, pairs = SETTINGS[4], PAIRS[:4]
    own = copy.deepcopy(model).train()
    scores(own, pairs, setting).square().mean().backward()
    scale = BACKBONES[name].embedding_scale
    slow = torch.stack([slow_scores(plain, model.lm_head, pair, setting, scale) for pair in pairs], 1)
    parameters = dict(plain.model.named_parameters())
    gradients = torch.autograd.grad(BACKBONES[name].finish(slow).square().mean(), parameters.values())
    actual = dict(own.model.named_parameters())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient.any(), parameter
        close(actual[parameter].grad, gradient, 2e-5 * max(1, float(gradient.abs().max())))


@EVERY_SETTING
def test_operations_are_those_that_torch_counts(layerwise_model, setting):
    shapes = [(QUERIES[0], 17, PROMPT), (QUERIES[0], 8, PROMPT), (QUERIES[1], 5, PROMPT)]
    pairs = pairs_of(shapes)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores(layerwise_model, pairs, setting)
    lengths = [(pair.query_length, pair.passage_length, pair.prompt_length) for pair in pairs]
    shares = torch.tensor([False, True, False])
    parts = torch.tensor(lengths).unbind(1)
    assert estimate_flops(layerwise_model.config, setting, *parts, shares) == counter.get_total_flops()


ROWS = arrays(
    "float32", array_shapes(min_dims=2, max_dims=2, max_side=70), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


@given(ROWS, st.sampled_from([torch.float32, torch.float64]))
def test_states_in_int8_are_off_by_half_a_step_of_their_block(values, dtype):
    states = torch.from_numpy(values).to(dtype)
    rows = to_int8(states)
    assert rows.dtype == torch.int8 and rows.shape == (len(states), states.shape[1] - 2 * (-states.shape[1] // BLOCK))
    found = from_int8(rows, states.shape[1])
    for own, state in zip(found.double().split(BLOCK, dim=1), states.double().split(BLOCK, dim=1), strict=True):
        step = (state.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)).clamp_min(torch.finfo(torch.float32).tiny)
        assert ((own - state).abs() <= step * (0.5 + 1e-4)).all()
        assert (own[state == 0] == 0).all()
    assert torch.equal(from_int8(rows[None], states.shape[1])[0], found)


def test_states_in_int8_may_have_no_tokens_and_are_read_from_any_address():
    states = torch.randn(9, 50)
    rows = to_int8(states)
    assert from_int8(rows[:0], 50).shape == to_int8(states[:0])[:, :50].shape == (0, 50)
    every = from_int8(rows, 50)
    for place in range(9):  # a row has 54 bytes, of which the scales begin at the 51st
        assert torch.equal(from_int8(rows[place : place + 1], 50)[0], every[place])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_state_that_is_no_number_is_none_in_int8_either(value):
    states = torch.full((2, 2 * BLOCK), 127.0)
    states[0, 3] = value
    found = from_int8(to_int8(states), 2 * BLOCK)
    assert not found[0, :BLOCK].isfinite().any() and torch.equal(found[0, BLOCK:], states[0, BLOCK:])
    assert torch.equal(found[1], states[1])
