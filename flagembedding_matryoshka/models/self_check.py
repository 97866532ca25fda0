"""Compare a backbone with transformers' own model, on a tiny copy with random weights.

A backbone takes its layers, norm and embeddings from transformers. It must repeat what the model does around them, such
as a multiplier of the embeddings, another norm or a cap of the logits. Without it, scores would be wrong silently.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig

logger = logging.get_logger(__name__)

TOLERANCE = 1e-4
"""Largest difference from transformers' scores, relative to the largest of them."""
VOCABULARY = 64
HEAD_TOKEN = 3
WINDOW = 5
LENGTHS = (19, 11, 1)
"""Tokens of the sequences that are scored: two are longer than a window, and one has a single token."""
MOST_KINDS = 4
"""Layers of the copy, at most, if each is of a different kind."""
_passed: set[tuple[Any, str]] = set()
"""The class and the configuration, as JSON, of each comparison that passed in this process."""
FAILURES = (
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""Errors of building or running a model that does not fit its configuration."""


def self_check(model_class: type[CostWiseForCausalLM], config: CostWiseConfig | None = None) -> None:
    """Refuse a backbone whose scores differ from those of transformers' own model.

    A small copy with random weights scores three short sequences on the CPU in float32, at full depth and width. It has
    one layer of each kind, at least two layers. Each structure is checked once in a process. The random state and the
    defaults of torch stay the same.

    Args:
        model_class: the backbone.
        config: configuration of a checkpoint. The copy has its kinds of layers, windows, caps, multipliers and rotary
            embedding. None is `config_class()` of the backbone.

    Raises:
        ValueError: if a score differs by more than `TOLERANCE` times the largest, or the backbone cannot score the
            sequences.
    """
    if config is not None:
        try:
            _check_once(model_class, config)
            return
        except _NoCopy as error:
            logger.warning(
                f"{model_class.__name__} is compared with transformers' model by its default configuration: the "
                f"checkpoint's configuration allows no small copy. ({error})"
            )
    try:
        _check_once(model_class, model_class.config_class())
    except _NoCopy as error:
        raise ValueError(
            f"{model_class.__name__} cannot be compared with transformers' model: its default configuration allows no "
            f"small copy. ({error})"
        ) from error


class _NoCopy(Exception):
    """transformers' own model cannot be built from the small configuration, or cannot score."""


def shrink(config: CostWiseConfig) -> dict[str, Any]:
    """Return the values of a small configuration with the structure of `config`.

    It has one layer of each kind, at least two layers. Two layers are of one kind if all lists with a value for each
    layer have equal values for them. The width of a head stays, because a rotary embedding may hold values for each of
    its dimensions.
    """
    values = config.to_dict()
    for name in ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version"):
        values.pop(name, None)
    for field in fields(CostWiseConfig):
        values.pop(field.name, None)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    declared = getattr(config, "head_dim", None)
    head_dim = declared or config.hidden_size // heads
    small_heads, small_key_heads = (2, 2) if key_heads == heads else (2, 1) if key_heads == 1 else (4, 2)
    hidden = small_heads * head_dim
    if declared and declared * heads != config.hidden_size:
        hidden //= 2
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_key_heads,
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    names = config.attribute_map
    values |= {
        names.get(name, name): value for name, value in small.items() if values.get(names.get(name, name)) is not None
    }
    if "head_dim" in values:
        values["head_dim"] = head_dim
    return values | _layers(values, names.get("num_hidden_layers", "num_hidden_layers"))


def _layers(values: dict[str, Any], count_name: str) -> dict[str, Any]:
    """Return the number of kept layers, and the lists with a value for each layer, cut to the kept layers."""
    count = values[count_name]
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple)
        and len(value) >= count
        and not name.endswith("_token_id")
        and all(isinstance(item, str | int | float | None) for item in value)
    }
    first_of_kind: dict[tuple[Any, ...], int] = {}
    for layer in range(count):
        first_of_kind.setdefault(tuple(value[layer] for value in lists.values()), layer)
    kept = list(first_of_kind.values())[:MOST_KINDS]
    if len(kept) == 1:
        kept *= 2
    return {count_name: len(kept), **{name: [lists[name][layer] for layer in kept] for name in lists}}


def _check_once(model_class: type[CostWiseForCausalLM], config: CostWiseConfig) -> None:
    try:
        values = shrink(config)
    except FAILURES as error:
        raise _NoCopy(f"{type(error).__name__}: {error}") from error
    structure = (model_class, json.dumps(values, sort_keys=True, default=str))
    if structure not in _passed:
        _check(model_class, values)
        _passed.add(structure)


def _check(model_class: type[CostWiseForCausalLM], values: dict[str, Any]) -> None:
    """Compare two models of a configuration with the `values` of `shrink`."""
    bases = model_class.__mro__
    stock_class: Any = bases[bases.index(CostWiseForCausalLM) + 1]
    with _plain_torch():
        generator = torch.Generator().manual_seed(0)
        sequences = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
        try:
            config = model_class.config_class.from_dict(values)
            stock = stock_class(copy.deepcopy(config)).eval()
            stock.set_attn_implementation("eager")
            _randomise(stock, generator)
            expected = torch.stack([stock(ids[None]).logits[0, -1, HEAD_TOKEN] for ids in sequences])
        except FAILURES as error:
            raise _NoCopy(f"{type(error).__name__}: {error}") from error
        try:
            actual = _own_scores(model_class, config, stock, sequences)
        except FAILURES as error:
            raise ValueError(
                f"{model_class.__name__} cannot score a packed batch: {type(error).__name__}: {error}. Its layers must "
                "be those of a causal decoder and take attention from transformers.AttentionInterface."
            ) from error
    largest = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"{model_class.__name__} does not compute what {stock_class.__name__} does: on a small copy with random "
            f"weights scores differ by {difference:.2g} where they are at most {largest:.2g} ({TOLERANCE:g} of that is "
            "allowed). The model does more than run its layers one after another. Write the rest in the backbone: "
            "`embeddings` changes the input of the first layer, `finish` the logits, and a decoder layer of its own "
            "changes the layers."
        )


def _own_scores(
    model_class: type[CostWiseForCausalLM], config: CostWiseConfig, stock: PreTrainedModel, sequences: list[Tensor]
) -> Tensor:
    """Return the (sequences,) float32 scores of the backbone with the weights of `stock`."""
    depth = config.num_hidden_layers
    config.layer_wise, config.exits = True, [depth]
    own = model_class(config).eval()
    weights: Any = stock.state_dict()
    vocabulary_head = weights.pop("lm_head.weight")
    weights["lm_head.0.linear_head.weight"] = vocabulary_head[[HEAD_TOKEN]]
    own.load_state_dict(weights)
    token_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    (scores,) = own(token_ids, mask, cutoff_layers=depth).logits
    return scores


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights that all change the scores: a matrix multiplies values by about 2, norms are not 1, biases not 0."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Compute on the CPU in float32 without gradients, and leave the random state and the defaults as they were."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float32)
    # With "medium" a CPU may multiply float32 in bfloat16.
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
