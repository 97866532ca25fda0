"""Batches of random tokens for the tiny models, and a slow and obvious model to hold their scores against."""

import inspect
from concurrent.futures import Future
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flagembedding_matryoshka.text.pairs import Prefix, TokenizedPair

VOCABULARY = 300
EXITS = (2, 3, 4, 5, 6)
WIDTHS = [
    {},
    {"compress_layers": 2, "compress_ratio": 2},
    {"compress_layers": [1, 3, 5], "compress_ratio": 4},
    {"compress_layers": [2, 4], "compress_ratio": 8},
]
# (query, passage, prompt): a short last group, no passage, a single passage token, a passage alone, a single token
LENGTHS = [(5, 17, 4), (3, 0, 4), (2, 1, 4), (0, 30, 0), (4, 9, 3), (1, 0, 0)]
QUERY_TOKENS = [[1], [1, 2], [3, 4, 5]]


@dataclass(frozen=True)
class TokenSequence:
    ids: list[int]
    query_length: int
    prompt_length: int


def tokenized_pair(ids, query_length, prompt_length) -> TokenizedPair:
    """Lists of tokens as the package holds them."""
    ids = np.array(ids, dtype=np.int32)
    passage_end = len(ids) - prompt_length
    lead = ids[:query_length]
    return TokenizedPair(Prefix(lead, lead.tobytes()), ids[query_length:passage_end], ids[passage_end:])


@st.composite
def tokenized_pairs(draw, min_size=0):
    shapes = draw(st.lists(st.tuples(st.sampled_from(QUERY_TOKENS), st.integers(0, 9)), min_size=min_size, max_size=12))
    return [tokenized_pair(query + [6] * passage + [7, 8], len(query), 2) for query, passage in shapes]


def random_sequences(lengths, seed=0) -> list[TokenSequence]:
    """One sequence per (query, passage, prompt) length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenSequence(torch.randint(VOCABULARY, (sum(parts),), generator=generator).tolist(), parts[0], parts[2])
        for parts in lengths
    ]


def collate(sequences, side="right", extra=0) -> dict:
    """Keyword arguments of a model; padding holds ordinary tokens, so that whoever reads it is found out."""
    length = max(len(sequence.ids) for sequence in sequences) + extra
    input_ids = torch.full((len(sequences), length), 7)
    attention_mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        tokens = slice(len(sequence.ids)) if side == "right" else slice(length - len(sequence.ids), None)
        input_ids[row, tokens] = torch.tensor(sequence.ids)
        attention_mask[row, tokens] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "query_lengths": [sequence.query_length for sequence in sequences],
        "prompt_lengths": [sequence.prompt_length for sequence in sequences],
    }


def scores(model, sequences, side="right", extra=0, cutoff_layers=EXITS, **width) -> Tensor:
    """(exits, batch)"""
    return torch.stack(model(**collate(sequences, side, extra), cutoff_layers=cutoff_layers, **width).logits)


def slow_scores(
    plain: PreTrainedModel,
    heads,
    sequence: TokenSequence,
    cutoff_layers=EXITS,
    compress_layers=(),
    compress_ratio=1,
    equal_weights=False,
    scale=1.0,
) -> Tensor:
    """(exits,) scores of one sequence: transformers' eager layers, one by one, each group of tokens in a loop.

    Args:
        heads: of the exits `EXITS`.
        scale: of the embeddings, where the decoder does it outside of them.
    """
    compress_layers = [compress_layers] if isinstance(compress_layers, int) else compress_layers
    hidden = plain.model.embed_tokens(torch.tensor([sequence.ids])) * scale
    result = {}
    for depth in range(1, max(cutoff_layers) + 1):
        hidden, attention = _eager_layer(plain, depth - 1, hidden)
        if depth in cutoff_layers:
            result[depth] = heads[EXITS.index(depth)](plain.model.norm(hidden[:, -1]))
        if compress_ratio > 1 and depth in compress_layers:
            row = torch.ones(hidden.shape[1]) if equal_weights else attention[0, :, -1].sum(0)
            passage_end = hidden.shape[1] - sequence.prompt_length
            merged = slow_compress(hidden[0], row, sequence.query_length, passage_end, compress_ratio)
            hidden = torch.stack(merged)[None]
    return torch.cat([result[depth] for depth in cutoff_layers])


def _eager_layer(plain, index, hidden):
    """The layer's output and its attention map (1, heads, length, length)."""
    layer, length = plain.model.layers[index], hidden.shape[1]
    layer_types = getattr(plain.config, "layer_types", None)
    # Mistral, Ministral 3 and Phi-3 name no types: their window is every layer's.
    is_sliding = layer_types is None or layer_types[index] == "sliding_attention"
    window = plain.config.sliding_window if is_sliding and hasattr(plain.config, "sliding_window") else None
    positions = torch.arange(length)[None]
    by_type = "layer_type" in inspect.signature(plain.model.rotary_emb.forward).parameters
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    if window is not None:
        mask += torch.full((length, length), -torch.inf).tril(-window)
    maps = []
    hook = layer.self_attn.register_forward_hook(lambda _module, _args, output: maps.append(output[1]))
    output = layer(
        hidden,
        attention_mask=mask,
        position_embeddings=plain.model.rotary_emb(hidden, positions, *([layer_types[index]] if by_type else [])),
        position_ids=positions,
    )
    hook.remove()
    return output, maps[0]


def slow_compress(tokens, row, passage_start, passage_end, ratio) -> list[Tensor]:
    """Tokens of one sequence, its passage's groups of `ratio` neighbours each replaced by their weighted mean."""
    merged = list(tokens[:passage_start])
    for start in range(passage_start, passage_end, ratio):
        group = slice(start, min(start + ratio, passage_end))
        weights = row[group] / row[group].sum() if row[group].any() else torch.ones_like(row[group]) / len(row[group])
        merged.append(weights @ tokens[group])
    return merged + list(tokens[passage_end:])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def out_of_memory_above(model, pairs_that_fit):
    embed = model.embed

    def limited(token_ids, packed, *setting):
        if len(packed.sequences) > pairs_that_fit:
            raise torch.OutOfMemoryError("no room")
        return embed(token_ids, packed, *setting)

    return limited


class ImmediateExecutor:
    """A pool of threads that is always faster than its caller: what is submitted is done at once."""

    def __init__(self, count):
        assert count == 1

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future
