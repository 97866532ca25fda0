"""A re-ranker on any decoder: one scoring head for each exit instead of the vocabulary head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import maybe_autocast

from flagembedding_matryoshka.models.attention import PACKED_ATTENTION
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.decoder import CostWiseModel, Lengths, PackedStates
from flagembedding_matryoshka.private import (
    get_whole_modules,
    ignore_on_load,
    keeps_in_float32,
    save_under_own_names,
    set_whole_modules,
    untie_weights,
)
from flagembedding_matryoshka.setting import Layers, Setting, resolve_alias

logger = logging.get_logger(__name__)


@dataclass
class CostWiseCausalLMOutputWithPast(ModelOutput):
    """Scores of one pass; every tuple has one entry per cutoff layer, in the order asked for.

    Attributes:
        logits: tuple of (batch,) float32 scores.
        hidden_states: tuple of (batch, length, hidden), normalised, zero where padded; None unless asked for.
        attention_masks: tuple of (batch, length) after compression, 1 on tokens; None unless asked for.
        full_width_logits: as `logits`, without compression and without a graph; None unless asked for.
    """

    logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attention_masks: tuple[Tensor, ...] | None = None
    full_width_logits: tuple[Tensor, ...] | None = None


class RowwiseLinear(nn.Linear):
    """A linear layer with one output and no bias, whose rows are independent of the number of rows.

    With gradients it is an ordinary product, because training sums over all rows.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, 1)."""
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.linalg.vecdot(input, self.weight).unsqueeze(-1)


class CostWiseHead(nn.Module):
    """The score of one exit: a bias-free projection of the last token's normalised state, in the head's own dtype.

    A model keeps its heads in float32: in bfloat16 a hundred candidates have a few dozen different scores. The score of
    a state is independent of the other states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_head = RowwiseLinear(hidden_size, 1, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, hidden) to (batch,) float32."""
        with maybe_autocast(states.device.type, enabled=False):
            return self.linear_head(states.to(self.linear_head.weight.dtype)).squeeze(-1).float()


class _Classifier(nn.Module):
    """Module names of a sequence classifier of transformers."""

    def __init__(self, config: CostWiseConfig, model: CostWiseModel, score: nn.Linear) -> None:
        super().__init__()
        self.config, self.model, self.score = config, model, score

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers."""
        return self.model.resize_token_embeddings(*args, **kwargs)


@keeps_in_float32("linear_head")
class CostWiseForCausalLM(PreTrainedModel):
    """Base class before a causal language model, which becomes a re-ranker with scores at its exits (arXiv 2501.16302).

    Attributes:
        model_class: the class of the decoder.
        exit_layers: the exit of each head, ascending.
        num_hidden_layers: number of decoder layers.
    """

    model_class: ClassVar[type[CostWiseModel]]
    exit_layers: list[int]
    num_hidden_layers: int
    # The backbone brings these. Its configuration is a CostWiseConfig, and its decoder becomes a CostWiseModel.
    config_class: Any
    config: Any
    model: Any
    lm_head: Any

    def __init__(self, config: CostWiseConfig) -> None:
        config = copy.deepcopy(config)  # the constructor changes it
        super().__init__(config)
        self.model.__class__ = self.model_class
        self.model.become_layer_wise()
        if config.layer_wise:
            self._use_heads([CostWiseHead(config.hidden_size) for _ in config.exit_layers])
        # A configuration with fewer layers than the checkpoint asks for its lower layers.
        kept = "|".join(map(str, range(config.num_hidden_layers)))
        heads = "|".join(map(str, range(len(config.exit_layers)))) if config.layer_wise else ""
        ignore_on_load(self, [rf"^model\.layers\.(?!({kept})\.)\d+\.", rf"^lm_head\.(?!({heads})\.)\d+\."])
        set_whole_modules(self, get_whole_modules(self.model))
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *args: Any,
        config: CostWiseConfig | None = None,
        adapt: Callable[[Any], Any] | None = None,
        as_classifier: bool = False,
        use_safetensors: bool | None = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a layer-wise `config` also turns a raw checkpoint into a re-ranker.

        If `config.base_exits` is set, these are the checkpoint's exits, and the model gets the exits of `config`.

        Args:
            adapt: A callable that gets a raw checkpoint while it has the head and the module names of transformers'
                own language model (`lm_head`) or sequence classifier (`score`), and returns the model to go on with.
                It is not called for a layer-wise checkpoint.
            use_safetensors: As in transformers, but True by default: pytorch_model.bin is not read. None reads it if
                there is no model.safetensors.
            as_classifier: Read the decoder of a raw language model as that of a sequence classifier. Its `score` head
                starts at random, so `adapt` must set it.

        Raises:
            ValueError: if the checkpoint is of another backbone, is raw and `config` does not say which exits it gets,
                has its heads at other layers than `config` says, lacks weights or has some that would be left out.
        """
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only") if key in kwargs}
        stored = cls.config_class.read(pretrained_model_name_or_path, **hub)
        has_score = not stored.layer_wise and any(
            name.endswith("ForSequenceClassification") for name in stored.architectures or ()
        )
        is_classifier = has_score or (as_classifier and not stored.layer_wise)
        if is_classifier:
            stored.become_classifier()
            kwargs["key_mapping"] = {r"^score\.": "lm_head.0.linear_head."}
        config = stored if config is None else config
        if not config.layer_wise:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no scoring heads: give a config with layer_wise=True and the "
                "exits that it shall have, or load it as a language model, with AutoModelForCausalLM."
            )
        if kwargs.get("attn_implementation") not in (None, PACKED_ATTENTION):
            raise ValueError(
                f"attn_implementation={kwargs['attn_implementation']!r} has no packed form; a layer-wise model brings "
                "its own attention. Leave the argument out."
            )
        exits = config.exit_layers
        if config.base_exits is not None or config.vocab_size != stored.vocab_size:
            config = copy.deepcopy(config)
            config.vocab_size = stored.vocab_size  # an adapter may bring more embeddings than its base has
            config.exits = config.exits if config.base_exits is None else config.base_exits
        if not stored.layer_wise:
            config = copy.deepcopy(config)
            config.layer_wise = False
            # The layer-wise model ties nothing, but the checkpoint may: then its lm_head is its embedding.
            config.tie_word_embeddings = stored.tie_word_embeddings
        elif stored.exit_layers[: len(config.exit_layers)] != config.exit_layers:
            raise ValueError(
                f"the exits asked for are {config.exit_layers}, but the heads of {pretrained_model_name_or_path} "
                f"were saved for {stored.exit_layers}. Leave start_layer, layer_sep and exits out to use the "
                "checkpoint's own."
            )
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=config,
            output_loading_info=True,
            use_safetensors=use_safetensors,
            **kwargs,
        )
        model, info = loaded
        if is_classifier and not has_score:
            info["unexpected_keys"].discard("lm_head.weight")
            info["missing_keys"].discard("lm_head.0.linear_head.weight")
        if "key_mapping" in kwargs:
            save_under_own_names(model)
        if is_classifier:  # by the names that they have in the checkpoint
            for keys in ("unexpected_keys", "missing_keys"):
                info[keys] = {name.replace("lm_head.0.linear_head.", "score.") for name in info[keys]}
        unknown = [name for name in sorted(info["unexpected_keys"]) if "rotary_emb" not in name]
        if unknown:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds weights that a {cls.__name__} has no place for: {unknown[:5]}."
            )
        if info["missing_keys"]:
            raise ValueError(f"{pretrained_model_name_or_path} lacks the weights {sorted(info['missing_keys'])[:5]}.")
        if not config.layer_wise:
            if adapt is not None:
                model = adapt(model)
            model._become_layer_wise()
        else:
            if is_classifier and adapt is not None:
                model._adapt_classifier(adapt)
            if config.base_exits is not None:
                model._use_exits(exits)
        return (model, info) if wants_info else model

    def _adapt_classifier(self, adapt: Callable[[Any], Any]) -> None:
        """Let `adapt` see the decoder and the head of the only exit under the names of transformers' classifiers."""
        (head,) = self.lm_head
        classifier = adapt(_Classifier(self.config, self.model, head.linear_head))
        self.model, head.linear_head = classifier.model, classifier.score

    def _become_layer_wise(self) -> None:
        """Replace the vocabulary head by one scoring head per exit."""
        token_ids = self.config.head_token_id
        vocabulary = self.lm_head.weight
        heads = [CostWiseHead(self.config.hidden_size).to(vocabulary.device) for _ in self.config.exit_layers]
        with torch.no_grad():
            for head in heads:
                if token_ids is None:
                    head.linear_head.weight.normal_(std=self.config.initializer_range)
                else:
                    yes, *no = [token_ids] if isinstance(token_ids, int) else token_ids
                    row = vocabulary[yes].float() - sum(vocabulary[token].float() for token in no)
                    head.linear_head.weight.copy_(row[None] * self.config.head_scale)
        if token_ids is None:
            logger.warning(
                "The scoring heads start at random, because config.head_token_id is not set. Set it to a token of the "
                'vocabulary, as find_head_token_id(tokenizer) finds for "Yes", to start from its row of lm_head.'
            )
        self.config.layer_wise = True
        self._use_heads(heads)

    def _use_exits(self, exits: Sequence[int]) -> None:
        """Change the exits. An exit that has a head keeps it, and the others get a copy of the deepest head."""
        own = dict(zip(self.config.exit_layers, self.lm_head, strict=True))
        deepest = self.lm_head[-1]
        self.config.exits, self.config.base_exits = list(exits), None
        self._use_heads([own[layer] if layer in own else copy.deepcopy(deepest) for layer in exits])

    def _use_heads(self, heads: Sequence[CostWiseHead]) -> None:
        self.lm_head = nn.ModuleList(heads)
        self.exit_layers, self.num_hidden_layers = self.config.exit_layers, self.config.num_hidden_layers
        self.config.tie_word_embeddings = False
        untie_weights(self)

    @property
    def linear_names(self) -> list[str]:
        """Names of the linear layers in decoder layers and heads, which adapters can go to."""
        modules = (*self.model.layers.named_modules(), *self.lm_head.named_modules())
        return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})

    def finish(self, scores: Tensor) -> Tensor:
        """Return final scores: what the decoder does to its logits, such as a cap."""
        return scores

    def score(self, layer: int, last_token_states: Tensor) -> Tensor:
        """Return (sequences,) float32 scores at exit `layer` from (sequences, hidden) normalised states."""
        return self.finish(self.lm_head[self.exit_layers.index(layer)](last_token_states))

    def scores(self, states: PackedStates, setting: Setting, cutoff_layers: Sequence[int] = ()) -> Tensor:
        """Return (cutoff layers, sequences) float32 scores, the layers in the order asked for.

        Brings `states` to the layer before the deepest exit.

        Args:
            cutoff_layers: the exits to read; empty is the exits of `setting`. A pass may be read before its end.
        """
        exits = cutoff_layers or setting.cutoff_layers
        if states.packed.device.type != "cpu":
            self.model.copy_indices(states, setting, exits)
        # Each exit is read alone, so that its scores are bitwise independent of the other exits asked for.
        found: dict[int, Tensor] = {}
        for layer in sorted(exits):
            for _ in self.model.run(states, setting, layer - 1):
                pass
            found[layer] = self.score(layer, self.model.read(states))
        return torch.stack([found[layer] for layer in exits])

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
            query_lengths, prompt_lengths: (batch,) tokens before and after the passage; compression needs them.
            output_hidden_states: also return `hidden_states` and `attention_masks`.
            return_full_width: also return `full_width_logits`, the scores without compression. The layers before the
                first compression run once for both.

        Returns:
            `CostWiseCausalLMOutputWithPast` with a tuple of (batch,) float32 `logits`.

        Raises:
            TypeError: if a layer is not an int.
            ValueError: if the request does not fit the model or the batch is malformed, and on arguments that only a
                language model has (labels, past_key_values, …).
        """
        compress_layers = resolve_alias(compress_layer, compress_layers)
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
        result = self._with_scores(outputs, Setting.resolve(self.config, cutoff_layers).cutoff_layers)
        return result.to_tuple() if return_dict is False else result

    def forward_packed(
        self, states: PackedStates, setting: Setting, return_full_width: bool = False
    ) -> CostWiseCausalLMOutputWithPast:
        """Run `forward` on a packed batch that `CostWiseModel.embed` embedded."""
        outputs = self.model.forward_packed(states, setting, return_full_width)
        return self._with_scores(outputs, setting.cutoff_layers)

    def _with_scores(self, outputs: Any, cutoffs: Sequence[int]) -> CostWiseCausalLMOutputWithPast:
        logits = tuple(map(self.score, cutoffs, outputs.last_token_states))
        full_width_logits = None
        if outputs.full_width_states is not None:
            with torch.no_grad():
                full_width_logits = tuple(
                    own.detach() if states is None else self.score(layer, states)
                    for layer, own, states in zip(cutoffs, logits, outputs.full_width_states, strict=True)
                )
        return CostWiseCausalLMOutputWithPast(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attention_masks=outputs.attention_masks,
            full_width_logits=full_width_logits,
        )
