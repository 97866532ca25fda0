"""The layer-wise, width-compressing Mistral (CostWise, arXiv 2501.16302) on transformers' own layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.utils import ModelOutput, logging

from flagembedding_matryoshka.models.attention import PACKED_ATTENTION
from flagembedding_matryoshka.models.compression import compress
from flagembedding_matryoshka.models.configuration import CostWiseMistralConfig, SubNetwork, as_layer_tuple
from flagembedding_matryoshka.models.packing import PackedBatch, pack
from flagembedding_matryoshka.models.query_sharing import share_queries

logger = logging.get_logger(__name__)

Layers = int | Sequence[int] | None
Lengths = Sequence[int] | Tensor | None


@dataclass
class CostWiseModelOutputWithPast(ModelOutput):
    """Hidden states of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        last_hidden_state: (batch, length, hidden), the last entry of `hidden_states`.
        past_key_values: None when layer-wise.
        last_token_states: tuple of (batch, hidden), normalised.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_states: as `last_token_states`, of the pass without compression and its graph; None for exits that
            are read before anything is compressed, where both passes are the same. None unless asked for.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    last_token_states: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_states: tuple[Tensor | None, ...] | None = None


@dataclass
class CostWiseCausalLMOutputWithPast(ModelOutput):
    """Scores of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        loss: None when layer-wise.
        logits: tuple of (batch,) float32 scores; (batch, length, vocabulary) when not layer-wise.
        past_key_values: None when layer-wise.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_logits: as `logits`, without compression and without a graph; None unless asked for.
    """

    loss: Tensor | None = None
    logits: tuple[Tensor, ...] | Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_logits: tuple[Tensor, ...] | None = None


@dataclass
class PackedStates:
    """How far a packed batch has come.

    Attributes:
        hidden: (1, total_tokens, hidden), not normalised.
        packed: where the sequences lie in it.
        layers_run: decoder layers behind it, with the compression that follows the last of them.
    """

    hidden: Tensor
    packed: PackedBatch
    layers_run: int = 0

    def select(self, sequences: Sequence[int]) -> PackedStates:
        """The states of some sequences, in the order given."""
        packed, tokens = self.packed.select(sequences)
        return PackedStates(self.hidden[:, tokens], packed, self.layers_run)


class CostWiseHead(nn.Module):
    """The score of one exit: a bias-free projection of the last token's normalised state."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_head = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, hidden) to (batch,) float32."""
        return self.linear_head(states).squeeze(-1).float()


class CostWiseMistralDecoderLayer(MistralDecoderLayer):
    """A Mistral layer that can also run on a packed row."""

    def forward(self, hidden_states: Tensor, *args: Any, packed: PackedBatch | None = None, **kwargs: Any) -> Any:
        """The layer's output; with `packed`, a pair of it and, where `last_row=True`, the last tokens' attention row.

        The row is a second output rather than a side effect so that gradient checkpointing sees it.
        """
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)
        rows: list[Tensor] | None = [] if kwargs.pop("last_row") else None
        output = super().forward(hidden_states, *args, packed=packed, last_rows=rows, **kwargs)
        return output, rows[0] if rows else None


class CostWiseMistralModel(MistralModel):
    """Mistral's decoder on a packed batch, stopping at the deepest cutoff and compressing the passage on its way."""

    config: CostWiseMistralConfig
    config_class = CostWiseMistralConfig
    _no_split_modules = ["CostWiseMistralDecoderLayer"]

    def __init__(self, config: CostWiseMistralConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            CostWiseMistralDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        if config.layer_wise:
            self.run_packed()
        self.post_init()

    def run_packed(self) -> None:
        """Let the layers attend inside the sequences of a packed row."""
        self.config._attn_implementation = PACKED_ATTENTION

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
        **kwargs: Any,
    ) -> Any:
        """See [`CostWiseMistralForCausalLM.forward`]; without `config.layer_wise`, `MistralModel.forward`."""
        if not self.config.layer_wise:
            return super().forward(input_ids, attention_mask, output_hidden_states=output_hidden_states, **kwargs)
        if input_ids is None:
            raise ValueError("A layer-wise pass needs input_ids.")
        sub_network = SubNetwork.resolve(self.config, cutoff_layers, compress_layers, compress_ratio)
        if sub_network.compress_ratio > 1 and query_lengths is None:
            raise ValueError("Compression needs query_lengths and prompt_lengths: only the passage is compressed.")
        token_ids, packed = pack(input_ids, attention_mask, query_lengths, prompt_lengths)
        if not output_hidden_states:
            token_ids, packed = share_queries(token_ids, packed)
        return self._forward_packed(
            self.embed(token_ids, packed), sub_network, bool(output_hidden_states), return_full_width
        )

    def embed(self, token_ids: Tensor, packed: PackedBatch) -> PackedStates:
        """Token ids (1, total_tokens) before the first layer.

        Raises:
            ValueError: if a sequence is longer than the sliding window.
        """
        window = self.config.sliding_window
        if window is not None and packed.max_seqlen > window:
            longest = int(packed.sequence_lengths.argmax())
            raise ValueError(
                f"row {longest} has {packed.max_seqlen} tokens, more than the sliding window of {window} that this "
                "model attends over. Use a smaller max_length."
            )
        return PackedStates(self.embed_tokens(token_ids), packed)

    def run(
        self, states: PackedStates, sub_network: SubNetwork, until: int
    ) -> Iterator[tuple[int, Tensor, PackedBatch]]:
        """Bring `states` to `until` layers, yielding what each layer gives before it is compressed.

        Yields:
            the number of layers run, (1, total_tokens, hidden) and where the sequences lie in it.
        """
        position_embeddings = self.rotary_emb(states.hidden, states.packed.position_ids)
        for depth in range(states.layers_run + 1, until + 1):
            compresses = sub_network.compresses_after(depth)
            hidden, row = self.layers[depth - 1](
                states.hidden, packed=states.packed, last_row=compresses, position_embeddings=position_embeddings
            )
            yield depth, hidden, states.packed
            if compresses:
                hidden, states.packed = compress(hidden, row, states.packed, sub_network.compress_ratio)
                position_embeddings = self.rotary_emb(hidden, states.packed.position_ids)
            states.hidden, states.layers_run = hidden, depth

    def _forward_packed(
        self, states: PackedStates, sub_network: SubNetwork, output_hidden_states: bool, return_full_width: bool
    ) -> CostWiseModelOutputWithPast:
        last_token_states: dict[int, Tensor] = {}
        full_width_states: dict[int, Tensor] | None = None
        hidden_states: dict[int, Tensor] = {}
        attention_masks: dict[int, Tensor] = {}
        for depth, hidden, packed in self.run(states, sub_network, sub_network.depth):
            if depth in sub_network.cutoff_layers:
                last_token_states[depth] = self.norm(hidden[0, packed.last_tokens])
                if output_hidden_states:
                    hidden_states[depth] = packed.pad(self.norm(hidden[0]))
                    attention_masks[depth] = packed.padded_attention_mask()
            if return_full_width and full_width_states is None and sub_network.compresses_after(depth):
                full_width_states = self._full_width_states(PackedStates(hidden, packed, depth), sub_network)

        def in_order(values: dict[int, Tensor]) -> tuple[Tensor, ...] | None:
            return tuple(values[layer] for layer in sub_network.cutoff_layers) if values else None

        per_layer = in_order(hidden_states)
        full_width = full_width_states or {}
        return CostWiseModelOutputWithPast(
            last_hidden_state=None if per_layer is None else per_layer[-1],
            last_token_states=in_order(last_token_states),
            hidden_states=per_layer,
            attention_masks=in_order(attention_masks),
            full_width_states=tuple(map(full_width.get, sub_network.cutoff_layers)) if return_full_width else None,
        )

    @torch.no_grad()
    def _full_width_states(self, states: PackedStates, sub_network: SubNetwork) -> dict[int, Tensor]:
        """Exit to (batch, hidden), of the exits that are left when the rest of the layers runs uncompressed."""
        return {
            depth: self.norm(hidden[0, packed.last_tokens])
            for depth, hidden, packed in self.run(states, SubNetwork(sub_network.cutoff_layers), sub_network.depth)
            if depth in sub_network.cutoff_layers
        }


class CostWiseMistralForCausalLM(MistralForCausalLM):
    """A re-ranker that can be read at any of its exits; without `config.layer_wise`, a plain Mistral language model."""

    config: CostWiseMistralConfig
    config_class = CostWiseMistralConfig
    _no_split_modules = ["CostWiseMistralDecoderLayer"]

    def __init__(self, config: CostWiseMistralConfig) -> None:
        super().__init__(config)
        self.model = CostWiseMistralModel(config)
        if config.layer_wise:
            self._use_heads([CostWiseHead(config.hidden_size) for _ in config.exit_layers])
        # A configuration of fewer layers than the checkpoint has asks for the lower part of it.
        kept = "|".join(map(str, range(config.num_hidden_layers)))
        heads = "|".join(map(str, range(len(config.exit_layers)))) if config.layer_wise else ""
        self._keys_to_ignore_on_load_unexpected = [
            rf"^model\.layers\.(?!({kept})\.)\d+\.",
            rf"^lm_head\.(?!({heads})\.)\d+\.",
        ]
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *args: Any,
        config: CostWiseMistralConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a layer-wise `config` also turns a raw Mistral checkpoint into a re-ranker.

        Raises:
            ValueError: if the checkpoint is not Mistral-shaped, has its heads at other layers than `config` says, or
                lacks weights.
        """
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        stored, _ = CostWiseMistralConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        if stored.get("model_type") not in ("mistral", CostWiseMistralConfig.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {stored.get('model_type')!r}; a re-ranker is "
                "made from a Mistral (model_type 'mistral') or loaded from a 'cost_wise_mistral' checkpoint."
            )
        if config is None:
            config = CostWiseMistralConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.layer_wise and kwargs.get("attn_implementation") not in (None, PACKED_ATTENTION):
            raise ValueError(
                f"attn_implementation={kwargs['attn_implementation']!r} has no packed form; a layer-wise model brings "
                "its own attention. Leave the argument out."
            )
        is_raw = config.layer_wise and not stored.get("layer_wise")
        if is_raw:
            config = copy.deepcopy(config)
            config.layer_wise = False
            # The layer-wise model ties nothing, but the checkpoint may: then its lm_head is its embedding.
            config.tie_word_embeddings = stored.get("tie_word_embeddings", False)
        if config.layer_wise:
            own = CostWiseMistralConfig.from_dict(stored).exit_layers
            if own[: len(config.exit_layers)] != config.exit_layers:
                raise ValueError(
                    f"the exits asked for are {config.exit_layers}, but the heads of {pretrained_model_name_or_path} "
                    f"were saved for {own}. Leave start_layer, layer_sep and exits out to use the checkpoint's own."
                )
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(f"{pretrained_model_name_or_path} lacks the weights {sorted(info['missing_keys'])[:5]}.")
        if is_raw:
            model._become_layer_wise()
        return (model, info) if wants_info else model

    def _become_layer_wise(self) -> None:
        """Replace the vocabulary head by one scoring head per exit."""
        token_id = self.config.head_token_id
        vocabulary = self.lm_head.weight
        heads = [CostWiseHead(self.config.hidden_size).to(vocabulary) for _ in self.config.exit_layers]
        with torch.no_grad():
            for head in heads:
                if token_id is None:
                    head.linear_head.weight.normal_(std=self.config.initializer_range)
                else:
                    head.linear_head.weight.copy_(vocabulary[token_id : token_id + 1] * self.config.head_scale)
        if token_id is None:
            logger.warning(
                "The scoring heads start at random, because config.head_token_id is not set. Set it to a token of the "
                'vocabulary, as find_head_token_id(tokenizer) finds for "Yes", to start from its row of lm_head.'
            )
        self.config.layer_wise = True
        self.model.run_packed()
        self._use_heads(heads)

    def _use_heads(self, heads: list[CostWiseHead]) -> None:
        self.lm_head = nn.ModuleList(heads)
        self.config.tie_word_embeddings = False
        self._tied_weights_keys = {}
        self.all_tied_weights_keys = {}

    def score(self, layer: int, hidden: Tensor, packed: PackedBatch) -> Tensor:
        """(sequences,) float32 scores of exit `layer` on what that many layers have given."""
        return self.lm_head[self.config.exit_layers.index(layer)](self.model.norm(hidden[0, packed.last_tokens]))

    def scores(self, states: PackedStates, sub_network: SubNetwork) -> Tensor:
        """(cutoff layers, sequences) float32 scores, the layers in the order asked for; brings `states` to the last."""
        found = {
            depth: self.score(depth, hidden, packed)
            for depth, hidden, packed in self.model.run(states, sub_network, sub_network.depth)
            if depth in sub_network.cutoff_layers
        }
        return torch.stack([found[layer] for layer in sub_network.cutoff_layers])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        compress_layer: Layers = None,
        compress_layers: Layers = None,
        compress_ratio: int | None = None,
        cutoff_layers: Layers = None,
        query_lengths: Lengths = None,
        prompt_lengths: Lengths = None,
        output_hidden_states: bool | None = None,
        return_full_width: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Score sequences of query part, passage and prompt part at each of `cutoff_layers`.

        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, length), non-zero on tokens; padding may stand on either side.
            compress_layer: the reference's spelling of `compress_layers`.
            compress_layers: numbers of layers after which the passage is compressed, an int or several.
            compress_ratio: 1 (off), 2, 4 or 8.
            cutoff_layers: exits to score at, an int or several; None is the deepest.
            query_lengths, prompt_lengths: (batch,) tokens before and behind the passage; compression needs them.
            output_hidden_states: also return `hidden_states` and `attention_masks`.
            return_full_width: also return `full_width_logits`, what the pass would score without compression. The
                layers in front of the first compression run once for both.

        Returns:
            `CostWiseCausalLMOutputWithPast` with a tuple of (batch,) float32 `logits`. Without `config.layer_wise`,
            what `MistralForCausalLM.forward` returns.

        Raises:
            TypeError: if a layer is not an int.
            ValueError: if the request does not fit the model or the batch is malformed, and on arguments that only a
                language model has (labels, past_key_values, …).
        """
        if not self.config.layer_wise:
            return super().forward(input_ids, attention_mask, output_hidden_states=output_hidden_states, **kwargs)
        if compress_layer is not None:
            if compress_layers is not None and as_layer_tuple("", compress_layer) != as_layer_tuple(
                "", compress_layers
            ):
                raise ValueError(f"compress_layer {compress_layer} and compress_layers {compress_layers} contradict.")
            compress_layers = compress_layer
        return_dict = kwargs.pop("return_dict", None)
        unused = [name for name, value in kwargs.items() if value is not None and value is not False]
        if unused:
            raise ValueError(f"A layer-wise re-ranker has no use for {unused}; these belong to a language model.")
        outputs = self.model(
            input_ids,
            attention_mask,
            compress_layers=compress_layers,
            compress_ratio=compress_ratio,
            cutoff_layers=cutoff_layers,
            query_lengths=query_lengths,
            prompt_lengths=prompt_lengths,
            output_hidden_states=output_hidden_states,
            return_full_width=return_full_width,
        )
        cutoffs = SubNetwork.resolve(self.config, cutoff_layers).cutoff_layers
        heads = [self.lm_head[self.config.exit_layers.index(layer)] for layer in cutoffs]
        logits = tuple(head(states) for head, states in zip(heads, outputs.last_token_states, strict=True))
        full_width_logits = None
        if return_full_width:
            with torch.no_grad():
                full_width_logits = tuple(
                    own.detach() if states is None else head(states)
                    for head, own, states in zip(heads, logits, outputs.full_width_states, strict=True)
                )
        result = CostWiseCausalLMOutputWithPast(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attention_masks=outputs.attention_masks,
            full_width_logits=full_width_logits,
        )
        return result.to_tuple() if return_dict is False else result


AutoConfig.register(CostWiseMistralConfig.model_type, CostWiseMistralConfig, exist_ok=True)
AutoModelForCausalLM.register(CostWiseMistralConfig, CostWiseMistralForCausalLM, exist_ok=True)
