"""A decoder that runs on a packed batch, compresses the passage on its way and stops at its deepest cutoff.

The classes here are base classes before transformers' own, whose layers, norms and embeddings do the arithmetic. The
particulars of each decoder are in [`~flagembedding_matryoshka.models.backbones`].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from flagembedding_matryoshka.models.attention import (
    INDICES,
    PACKED_ATTENTION,
    SEPARATE_ATTENTION,
    choose_kernel,
    context_indices,
)
from flagembedding_matryoshka.models.batch import PackedBatch, apart_indices, copy_indices, row_indices
from flagembedding_matryoshka.models.compiling import OPAQUE_ATTENTION
from flagembedding_matryoshka.models.compression import SlotsOf, compress
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.invariance import tile_linears
from flagembedding_matryoshka.models.layers import CostWiseLayer
from flagembedding_matryoshka.models.packing import pack, share_queries
from flagembedding_matryoshka.models.split import SplitBatch, split_passages
from flagembedding_matryoshka.private import (
    BackboneAttention,
    attention_of,
    set_whole_modules,
    takes_attention_from_interface,
)
from flagembedding_matryoshka.setting import Layers, Setting

Lengths = Sequence[int] | Tensor | None


@dataclass
class PackedStates:
    """The states of a packed batch after some layers.

    Attributes:
        hidden: (1, total_tokens, hidden), not normalised.
        packed: where the segments lie in it.
        layers_run: number of decoder layers that have run, including the compression after the last one.
        split: where queries and passages lie in `hidden` before the store layer, apart from one another; None from
            there on, and without a store layer.
    """

    hidden: Tensor
    packed: PackedBatch
    layers_run: int = 0
    split: SplitBatch | None = None

    def apart(self) -> PackedStates:
        """Return the states with a copy of each shared segment for each of its sequences."""
        assert self.split is None
        (tokens,) = self.packed.indices(apart_indices)
        return PackedStates(self.hidden[:, tokens], self.packed.apart, self.layers_run)

    def select(self, sequences: Sequence[int]) -> PackedStates:
        """Return the states of some sequences, in the order given."""
        assert self.split is None
        packed, tokens = self.packed.select(sequences)
        return PackedStates(self.hidden[:, tokens], packed, self.layers_run)

    @classmethod
    def concat(cls, batches: Sequence[PackedStates]) -> PackedStates:
        """The sequences of several batches that have run the same layers, batch after batch."""
        assert all(states.split is None for states in batches)
        hidden = torch.cat([states.hidden for states in batches], dim=1)
        return cls(hidden, PackedBatch.concat([states.packed for states in batches]), batches[0].layers_run)


@dataclass
class CostWiseModelOutputWithPast(ModelOutput):
    """Hidden states of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        last_hidden_state: (batch, length, hidden), the last entry of `hidden_states`.
        last_token_states: tuple of (batch, hidden), normalised.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_states: as `last_token_states`, of the pass without compression and its graph; None for exits that
            are read before anything is compressed, where both passes are the same. None unless asked for.
    """

    last_hidden_state: Tensor | None = None
    last_token_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_states: tuple[Tensor | None, ...] | None = None


class CostWiseModel(BackboneAttention, PreTrainedModel):
    """Base class before a decoder of transformers, which then computes states at any depth and width.

    Attributes:
        layer_class: the class of the decoder's layers.
        rotary_by_layer_type: whether `rotary_emb` takes a layer type; `config.layer_types` has the type of each layer.
        batch_invariant: whether the states of a sequence are bitwise independent of its batch.
        max_positions: number of tokens of a sequence, at most.
    """

    layer_class: ClassVar[type[CostWiseLayer]]
    rotary_by_layer_type: ClassVar[bool] = False
    batch_invariant = False
    max_positions: int
    # The backbone brings these. Its configuration is a CostWiseConfig, too.
    config: Any
    embed_tokens: Any
    layers: Any
    norm: Any
    rotary_emb: Any

    def __init__(self, config: CostWiseConfig) -> None:
        super().__init__(copy.deepcopy(config))  # the constructor changes it
        self.become_layer_wise()

    def become_layer_wise(self) -> None:
        """Turn the layers of transformers' decoder, with their weights, into layers that run on a packed row.

        Raises:
            ValueError: if they do not take attention from `transformers.AttentionInterface`, or it is not causal.
        """
        if not takes_attention_from_interface(self):
            raise ValueError(
                f"{type(self).__name__} cannot run on a packed row: in transformers, its layers do not take attention "
                "from AttentionInterface."
            )
        for layer in self.layers:
            for part in layer.modules():
                if not getattr(part, "is_causal", True):
                    raise ValueError(
                        f"attention in {type(part).__name__} is not causal: sequences cannot be packed as here."
                    )
            layer.__class__ = self.layer_class
        rope = self.config.rope_parameters or {}
        of_types = [rope[name] for name in set(self.config.layer_types)] if self.rotary_by_layer_type else [rope]
        longrope = [one for one in of_types if one.get("rope_type") == "longrope"]
        # Beyond these, frequencies depend on the longest sequence of a batch, and so would scores.
        original = [one["original_max_position_embeddings"] for one in longrope]
        self.max_positions = min([self.config.max_position_embeddings, *original])
        set_whole_modules(self, [self.layer_class.__name__])
        self.set_attn_implementation(PACKED_ATTENTION)

    def become_batch_invariant(self) -> None:
        """Make states of a sequence independent of its batch, if each query is a segment of its own."""
        tile_linears(self.layers)
        self.set_attn_implementation(SEPARATE_ATTENTION)
        self.batch_invariant = True

    def compile_layers(self) -> None:
        """Compile each layer before and after its attention. The first passes take longer."""
        self.set_attn_implementation(OPAQUE_ATTENTION)
        for layer in self.layers:
            layer._all_tokens = torch.compile(layer._all_tokens, dynamic=True)
            layer.is_compiled = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        compress_layers: Layers = None,
        compress_ratio: int | None = None,
        cutoff_layers: Layers = None,
        query_lengths: Lengths = None,
        prompt_lengths: Lengths = None,
        output_hidden_states: bool | None = None,
        return_full_width: bool = False,
    ) -> CostWiseModelOutputWithPast:
        """See [`~flagembedding_matryoshka.models.causal_lm.CostWiseForCausalLM.forward`]."""
        if input_ids is None:
            raise ValueError("A layer-wise pass needs input_ids.")
        setting = Setting.resolve(self.config, cutoff_layers, compress_layers, compress_ratio)
        if setting.compress_ratio > 1 and query_lengths is None:
            raise ValueError("Compression needs query_lengths and prompt_lengths: only the passage is compressed.")
        token_ids, packed = pack(input_ids, attention_mask, query_lengths, prompt_lengths)
        if not output_hidden_states:
            token_ids, packed = share_queries(token_ids, packed)
        states = self.embed(token_ids, packed, setting)
        return self.forward_packed(states, setting, return_full_width, bool(output_hidden_states))

    def embeddings(self, token_ids: Tensor) -> Tensor:
        """Return the input of the first layer, (1, total_tokens, hidden)."""
        return self.embed_tokens(token_ids)

    def embed(
        self,
        token_ids: Tensor,
        packed: PackedBatch,
        setting: Setting | None = None,
        stored: Sequence[Tensor] | None = None,
    ) -> PackedStates:
        """Return the states of token ids before the first layer.

        Args:
            token_ids: (1, total_tokens) int64, on the CPU or on the device of `packed`.
            setting: the setting of the pass. Its indices, with a cascade those of the first stage, are copied to the
                device in one copy with the token ids. With a store layer, passages are apart from their queries in the
                states. None copies the token ids alone, and has no store layer.
            stored: for each sequence the states of its passage, as in `split_passages`, of the setting's store layer
                and compressed there. None: passages are computed.

        Raises:
            ValueError: if a sequence is longer than the positions that the model knows.
        """
        limit = self.max_positions
        length, longest = packed.sequence_lengths.max(0)
        if length > limit:
            is_longrope = limit < self.config.max_position_embeddings
            reason = "original_max_position_embeddings of longrope" if is_longrope else "max_position_embeddings"
            raise ValueError(
                f"row {longest} has {length} tokens, more than {reason}={limit}. Use a smaller max_length."
            )
        split = None
        if setting is not None and setting.store_layer:
            token_ids, split = split_passages(token_ids, packed, stored)
        if packed.device.type != "cpu":
            indices: Iterable[tuple[PackedBatch, Callable[[PackedBatch], tuple[Any, ...]]]] = ()
            if setting is not None:
                exits = (setting.cascade[0][0],) if setting.cascade else setting.cutoff_layers
                indices = self._indices(packed, split, setting, exits)
            if token_ids.device.type == packed.device.type:
                copy_indices(indices, packed.device)
            else:
                (token_ids,) = copy_indices(indices, packed.device, token_ids)
        return PackedStates(self.embeddings(token_ids), packed, split=split)

    def copy_indices(self, states: PackedStates, setting: Setting, exits: Sequence[int]) -> None:
        """Copy the indices to the device, in one copy, that a pass from `states` to the deepest of `exits` needs.

        A pass that needs others copies them when it needs them. On a CPU nothing is copied, so a caller skips this.
        """
        indices = self._indices(states.packed, states.split, setting, exits, states.layers_run)
        copy_indices(indices, states.packed.device)

    def _indices(
        self,
        packed: PackedBatch,
        split: SplitBatch | None,
        setting: Setting,
        exits: Sequence[int],
        layers_run: int = 0,
    ) -> Iterator[tuple[PackedBatch, Callable[[PackedBatch], tuple[Any, ...]]]]:
        """Yield the batches of a pass, whose rows compression shortens, and the functions that make their indices."""
        # A query without tokens, as kernels are chosen by its device, dtype and head dimension.
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        choose = partial(
            choose_kernel,
            self.embed_tokens.weight.new_empty(1, 1, 0, head_dim),
            packed,
            getattr(self.config, "attn_logit_softcapping", None),
            separately=self.batch_invariant,
            compiled=attention_of(self) == OPAQUE_ATTENTION,
            dropout=getattr(self.config, "attention_dropout", 0.0) if self.training else 0.0,
        )
        for depth in range(layers_run + 1, max(exits) + 1):
            running = packed if split is None else split.batch
            yield running, row_indices
            if depth in exits:
                yield packed, INDICES[choose(only_last=True)]
            if depth == max(exits):
                return
            compresses = setting.compresses_after(depth)
            weighs = compresses and split is None and self.config.compress_weights == "attention"
            if weighs and packed.shares_passages:
                yield packed, apart_indices
                running = packed = packed.apart
                yield packed, row_indices
            if weighs:
                yield packed, context_indices
            kernel = choose()
            if kernel in INDICES:
                yield running, INDICES[kernel]
            if split is not None and depth == setting.store_layer:
                yield packed, split.tokens
                compresses = compresses and split.stored is None
                split = None
            if compresses:
                yield packed, SlotsOf(setting.compress_ratio)
                packed = packed.compressed(setting.compress_ratio)

    def rotary_embeddings(self, hidden: Tensor, packed: PackedBatch) -> list[tuple[Tensor, Tensor]]:
        """Return cosines and sines for each layer, (1, total_tokens, rotary_dim) each."""
        positions = packed.indices(row_indices).position_ids
        if not self.rotary_by_layer_type:
            return [self.rotary_emb(hidden, positions)] * len(self.layers)
        types = self.config.layer_types[: len(self.layers)]
        by_type = {name: self.rotary_emb(hidden, positions, name) for name in set(types)}
        return [by_type[name] for name in types]

    def run(self, states: PackedStates, setting: Setting, until: int) -> Iterator[tuple[int, Tensor, PackedBatch]]:
        """Run layers on `states` until `until` have run.

        After the store layer, queries and passages are joined to sequences. Passage tokens weigh the same if they are
        compressed there, because the last token's attention depends on the query. Stored passages are compressed
        already.

        Yields:
            after each layer, before its compression: the number of layers that have run, the states (1, total_tokens,
            hidden), and where the segments lie in them.
        """
        rotary: list[tuple[Tensor, Tensor]] | None = None
        for depth in range(states.layers_run + 1, until + 1):
            joins = states.split if depth == setting.store_layer else None
            is_stored = joins is not None and joins.stored is not None
            compresses = setting.compresses_after(depth) and not is_stored
            weighs = compresses and joins is None and self.config.compress_weights == "attention"
            if weighs and states.packed.shares_passages:
                # Each query weights the passage tokens differently.
                separate = states.apart()
                states.hidden, states.packed, rotary = separate.hidden, separate.packed, None
            running = states.packed if states.split is None else states.split.batch
            rotary = rotary or self.rotary_embeddings(states.hidden, running)
            hidden, row = self.layers[depth - 1](
                states.hidden,
                packed=running,
                last_row=weighs,
                only_last=False,
                position_embeddings=rotary[depth - 1],
            )
            if joins is not None:
                hidden, states.split = joins.join(hidden, states.packed), None
                running, rotary = states.packed, None
            yield depth, hidden, running
            if compresses:
                hidden, states.packed = compress(hidden, row, states.packed, setting.compress_ratio)
                rotary = None
            states.hidden, states.layers_run = hidden, depth

    def passage_states(self, token_ids: Tensor, lengths: Tensor, setting: Setting) -> list[Tensor]:
        """Compute the states of passages after the store layer of a setting, compressed there.

        Args:
            token_ids: (1, sum of lengths) int64 tokens of the passages, on the CPU.
            lengths: (passages,) int64, CPU: tokens of each one, at least 1.

        Returns:
            For each passage its (tokens, hidden) states, on the model's device.
        """
        none = torch.zeros_like(lengths)
        states = self.embed(token_ids, PackedBatch(none, lengths, none, self.embed_tokens.weight.device))
        for _ in self.run(states, Setting(setting.cutoff_layers), setting.store_layer):
            pass
        hidden, packed = states.hidden, states.packed
        if setting.compresses_after(setting.store_layer):
            hidden, packed = compress(hidden, None, packed, setting.compress_ratio)
        return list(hidden[0].split(packed.lengths.tolist()))

    def read(self, states: PackedStates) -> Tensor:
        """Return the (sequences, hidden) normalised states after the next layer, which runs for the last tokens alone.

        `states` stay as they are.
        """
        packed = states.packed
        ends, _ = self.layers[states.layers_run](
            states.hidden,
            packed=packed,
            last_row=False,
            only_last=True,
            position_embeddings=self.rotary_embeddings(states.hidden, packed)[states.layers_run],
        )
        last = ends[0] if packed.prefixes is None else ends[0, packed.indices(row_indices).sequences]
        return self.norm(last.float())  # in float32, so that heads do not see rounded states

    def forward_packed(
        self,
        states: PackedStates,
        setting: Setting,
        return_full_width: bool = False,
        output_hidden_states: bool = False,
    ) -> CostWiseModelOutputWithPast:
        """Run `forward` on a packed batch.

        Brings `states` to the layer before the last one of `setting`; with `output_hidden_states` to the last one.
        """
        exits = setting.cutoff_layers
        if states.packed.device.type != "cpu":
            self.copy_indices(states, setting, exits)
        last_token_states: dict[int, Tensor] = {}
        full_width_states: dict[int, Tensor] | None = None
        hidden_states: dict[int, Tensor] = {}
        attention_masks: dict[int, Tensor] = {}
        for depth, hidden, packed in self.run(states, setting, setting.depth - (not output_hidden_states)):
            if depth in exits:
                last_token_states[depth] = self.norm(hidden[0, packed.indices(row_indices).last_tokens].float())
                if output_hidden_states:
                    hidden_states[depth] = packed.pad(self.norm(hidden[0]))
                    attention_masks[depth] = packed.padded_attention_mask()
            if return_full_width and full_width_states is None and setting.compresses_after(depth):
                deeper = Setting(tuple(layer for layer in exits if layer > depth))
                with without_graph(hidden.device.type):
                    branch = self.forward_packed(PackedStates(hidden, packed, depth), deeper)
                full_width_states = dict(zip(deeper.cutoff_layers, branch.last_token_states or (), strict=True))
        if setting.depth not in last_token_states:
            last_token_states[setting.depth] = self.read(states)

        def in_order(values: dict[int, Tensor]) -> tuple[Tensor, ...] | None:
            return tuple(values[layer] for layer in exits) if values else None

        per_layer = in_order(hidden_states)
        full_width = full_width_states or {}
        return CostWiseModelOutputWithPast(
            last_hidden_state=None if per_layer is None else per_layer[-1],
            last_token_states=in_order(last_token_states),
            hidden_states=per_layer,
            attention_masks=in_order(attention_masks),
            full_width_states=tuple(map(full_width.get, exits)) if return_full_width else None,
        )


@contextmanager
def without_graph(device_type: str) -> Iterator[None]:
    """Disable gradients, and the cache of weights that autocast has cast.

    Before torch 2.11, a weight that is cast without gradients enters this cache without a graph. A later pass with
    gradients takes it from there, and the weight gets no gradient (pytorch#165068).

    Args:
        device_type: type of the device that the pass runs on.
    """
    autocast: Any = nullcontext()
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        autocast = torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)
    with torch.no_grad(), autocast:
        yield
