"""Adapters: what they note of themselves, how they are merged, and which of them act."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, PeftType, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

from flagembedding_matryoshka.checkpoints.gguf import resolve
from flagembedding_matryoshka.checkpoints.shipped import checked, locate
from flagembedding_matryoshka.models.backbones import read_config
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.private import adapters_of, find_file
from flagembedding_matryoshka.quiet import without_deprecation
from flagembedding_matryoshka.setting import COMPRESS_RATIOS

MERGED_TYPES = (
    PeftType.LORA,
    PeftType.ADALORA,
    PeftType.LOHA,
    PeftType.LOKR,
    PeftType.IA3,
    PeftType.OFT,
    PeftType.LN_TUNING,
    PeftType.TRAINABLE_TOKENS,
)
"""Kinds of adapters that become weights of the model. Merged models were compared with peft's for each of them."""
PICKLED = (
    "the weights of {path} are pickled ({file}), and a pickle can run code when it is read. If its source can be "
    "trusted, give allow_pickle=True (--allow_pickle). Otherwise ask for {instead}."
)
PREFIX = "base_model.model."
VOCABULARY = ("embed_tokens", "lm_head")


class Adapter(NamedTuple):
    """An adapter that is read.

    Attributes:
        path: where it lies, as the caller says it.
        config: its adapter_config.json.
        weights: its tensors, by peft's names without "base_model.model.".
        of_exits: whether it was trained on a layer-wise model, with its scoring heads.
    """

    path: str
    config: PeftConfig
    weights: dict[str, Tensor]
    of_exits: bool

    @property
    def has_score(self) -> bool:
        """Whether it brings the head of a sequence classifier."""
        return any(name.startswith("score.") for name in self.weights)

    def names(self, parts: Collection[str]) -> list[str]:
        """The weights in modules of these names."""
        return [name for name in self.weights if not {*name.split(".")}.isdisjoint(parts)]

    def rows(self, module: str) -> int:
        """The rows that it brings of the embedding ("embed_tokens") or the vocabulary head ("lm_head"); 0 for none."""
        pattern = re.compile(
            rf"(.*\.)?{module}\.((token_adapter\.)?base_layer\.|original_module\.|modules_to_save\.)?weight"
        )
        return max((len(weight) for name, weight in self.weights.items() if pattern.fullmatch(name)), default=0)

    @property
    def vocabulary_size(self) -> int:
        """The tokens of the language model that it was trained on; 0 if it does not say."""
        return 0 if self.of_exits else self.rows("embed_tokens") or self.rows("lm_head")


def base_of(adapter: str, **hub: Any) -> tuple[str, str | None]:
    """What an adapter notes as its base, and the base's revision if it notes one.

    Raises:
        FileNotFoundError: if that is a path which is no longer there.
        ValueError: if it notes none, or adapters of its kind cannot become weights of the model.
    """
    noted = _config(adapter, **hub)
    base = noted.base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapter_config.json of {adapter} has base_model_name_or_path={base!r}. Load the base that it was "
            f"trained on, with peft_path={adapter!r}."
        )
    try:
        return checked(base), noted.revision
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the adapter {adapter} was trained on {base}, which is not there. If the base has moved, load it from "
            f"where it is, with the adapter on top: its path as the model, and peft_path={adapter!r}."
        ) from error


def place_of_config(adapter: str, base: str, base_revision: str | None, **hub: Any) -> tuple[str, dict[str, Any]]:
    """Where the configuration of a base with its adapter lies.

    Fine-tuning in this package writes a config.json into the adapter's directory. Other programs, as FlagEmbedding's
    runners, write none; then it is the base's.

    Args:
        adapter: the adapter's directory or name.
        base, base_revision: as `base_of` returns them.
        hub: as of `hub_options`; `revision` is that of the adapter.

    Returns:
        the directory or name, and the options of `hub` for it.

    Raises:
        FileNotFoundError: if neither the adapter nor the base has a configuration that can be read.
    """
    if _noted(adapter, **hub):
        return adapter, dict(hub)
    place = resolve(locate(base), hub.get("cache_dir"))
    of_base = {name: value for name, value in {**hub, "revision": base_revision}.items() if value is not None}
    try:
        found = cached_file(place, CONFIG_NAME, **of_base)
    except OSError as error:
        raise _no_base(adapter, base, error) from error
    if found is None:
        raise _no_base(adapter, base)
    return place, of_base


def _no_base(adapter: str, base: str, error: OSError | None = None) -> FileNotFoundError:
    return FileNotFoundError(
        f"the adapter {adapter} was trained on {base}, which is neither a directory here with a config.json nor a "
        f"model that could be read from the hub. Load the base from where it is, with peft_path={adapter!r}."
        + (f" ({error})" if error else "")
    )


def adapter_file(adapter: str, **hub: Any) -> Path:
    """Where the weights of an adapter lie.

    Raises:
        FileNotFoundError: if it has none.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        file = find_file(adapter, name, **hub)
        if file is not None:
            return Path(file)
    raise FileNotFoundError(
        f"the adapter {adapter} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}."
    )


def refuse_other_heads(adapter: str, config: CostWiseConfig, **hub: Any) -> None:
    """Adapters find heads by their number: those of other exits would go into the wrong ones without a word.

    Raises:
        ValueError: if fine-tuning noted exits beside the adapter that do not begin with those of `config`.
    """
    if _noted(adapter, **hub).get("layer_wise"):
        exits = read_config(adapter, **hub).exit_layers
        if exits[: len(config.exit_layers)] != config.exit_layers:
            raise ValueError(f"the adapter {adapter} is for the exits {exits}, but the model has {config.exit_layers}.")


def refuse_other_head(adapter: Adapter, model: str, after: str | None = None) -> None:
    """Refuse an adapter of a language model or classifier whose head it changes, where the model has heads of exits.

    Args:
        model: what the error calls the model.
        after: the adapter of the layer-wise model that comes before it; None if the model was layer-wise before.

    Raises:
        ValueError: if the adapter changes the head or, with `after`, the embedding.
    """
    changed = adapter.names(("lm_head", "score") if after is None else ("lm_head", "score", "embed_tokens"))
    if adapter.of_exits or not changed:
        return
    subject = f"the adapter {adapter.path} of a language model or classifier changes {', '.join(changed[:5])}"
    if after is not None:
        raise ValueError(f"{subject}, but comes after {after}, an adapter of the layer-wise model. List it first.")
    raise ValueError(
        f"{subject}, but {model} has a scoring head for each exit instead. Merge it into the raw checkpoint before "
        "heads are made of that: give the raw checkpoint, with the adapter as peft_path or raw_peft."
    )


def read_adapter(path: str, allow_pickle: bool = False, **hub: Any) -> Adapter:
    """Read an adapter's files.

    Args:
        path: a directory, or a name on the hub.
        allow_pickle: read weights from adapter_model.bin if there is no adapter_model.safetensors.
        hub: `cache_dir`, `token`, `revision`, … as in transformers.

    Raises:
        FileNotFoundError: if it has no weights.
        ValueError: if adapters of its kind cannot become weights of the model, or its weights are pickled and
            `allow_pickle` is False.
    """
    config = _config(path, **hub)
    for name in ("alora_invocation_tokens", "layer_replication", "arrow_config", "target_parameters"):
        if getattr(config, name, None):
            raise ValueError(
                f"the adapter {path} has {name}={getattr(config, name)!r:.80} in its adapter_config.json, which cannot "
                "be merged into a re-ranker."
            )
    file = adapter_file(path, **hub)
    if file.name == WEIGHTS_NAME and not allow_pickle:
        raise ValueError(PICKLED.format(path=path, file=file.name, instead=SAFETENSORS_WEIGHTS_NAME))
    # From the directory: peft asks the hub for weights, even if `local_files_only` forbids it.
    stored = load_peft_weights(str(file.parent), device="cpu")
    weights = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    of_exits = bool(_noted(path, **hub).get("layer_wise")) or any("linear_head" in name for name in weights)
    return Adapter(path, config, weights, of_exits)


def trains_classifier(path: str, allow_pickle: bool = False, **hub: Any) -> bool:
    """Whether an adapter was trained on a sequence classifier, and brings its head. It may raise as `read_adapter`."""
    return _config(path, **hub).task_type == TaskType.SEQ_CLS and read_adapter(path, allow_pickle, **hub).has_score


def _config(adapter: str, **hub: Any) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        ValueError: if adapters of its kind cannot become weights of the model, or peft does not know it.
    """
    file = cached_file(adapter, ADAPTER_CONFIG_NAME, **hub)
    kind = json.loads(Path(str(file)).read_text(encoding="utf-8")).get("peft_type")
    if kind not in {one.value for one in MERGED_TYPES}:
        raise ValueError(
            f"the adapter {adapter} has the type {kind} (peft_type of its adapter_config.json), which cannot be merged "
            f"into the model. Adapters of these types can: {', '.join(one.value for one in MERGED_TYPES)}."
        )
    return PeftConfig.from_pretrained(str(Path(str(file)).parent))


def attach(model: Any, adapter: Adapter, depth: int, name: str = "default", is_trainable: bool = False) -> PeftModel:
    """Put an adapter into a model, without merging it.

    Args:
        model: a layer-wise model, or a language model or classifier with the module names of transformers.
        depth: the layers of the whole checkpoint, of which `model` may have fewer. Weights of layers that are not there
            are left out.
        name: what the adapter is called in the model.
        is_trainable: let the adapter learn.

    Raises:
        ValueError: if it has weights that no module of the model takes, lacks weights of the modules that it names, or
            has weights of other shapes.
    """
    config: Any = adapter.config
    kind = type(model).__name__.removeprefix("_")
    weights = {PREFIX + key: value for key, value in adapter.weights.items() if not _is_cut(key, model.config, depth)}
    if adapter.has_score and "score" not in (config.modules_to_save or ()) and f"{PREFIX}score.weight" in weights:
        # Older releases of peft train the head of every SEQ_CLS model and do not note it.
        config.modules_to_save = [*(config.modules_to_save or ()), "score"]
    config.inference_mode = not is_trainable
    try:
        with _no_warnings_of_ties(), without_deprecation():
            peft_model = PeftModel(model, config, adapter_name=name)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapter {adapter.path} does not fit a {kind}: {error}") from error
    with _no_warnings_of_ties():
        expected = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    present = peft_model.state_dict()
    # A trainer that resized the vocabulary saves its embedding and head, too, by the names that they have inside peft.
    present |= {re.sub(rf"\.{name}(?=\.|$)", "", key): value for key, value in present.items()}
    unused = [key.removeprefix(PREFIX) for key in weights if key not in expected and key not in present]
    missing = [key.removeprefix(PREFIX) for key in expected if key not in weights]
    for keys, fault in ((unused, "has weights that no module of a {} takes"), (missing, "lacks weights for a {}")):
        if keys:
            raise ValueError(
                f"the adapter {adapter.path} {fault.format(kind)}: {', '.join(keys[:5])}"
                f"{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}. It belongs to another model."
            )
    for key, value in weights.items():
        shape = expected[key].shape if key in expected else present[key].shape
        if value.shape != shape:
            raise ValueError(
                f"the adapter {adapter.path} has {key.removeprefix(PREFIX)} of shape {tuple(value.shape)}, but a "
                f"{kind} takes {tuple(shape)}. It belongs to another model."
            )
    set_peft_model_state_dict(peft_model, weights, adapter_name=name)
    return peft_model


def merge(model: Any, adapter: Adapter, depth: int) -> Any:
    """Merge an adapter into a model, whose weights change.

    A language model whose vocabulary head is tied to its embedding keeps two matrices if the adapter changes them.

    Args:
        model, depth: as of `attach`.

    Raises:
        ValueError: as `attach`, or if peft cannot merge it.
    """
    if adapter.vocabulary_size not in (0, model.config.vocab_size):
        model.resize_token_embeddings(adapter.vocabulary_size, mean_resizing=False)
    peft_model = attach(model, adapter, depth)
    is_tied = isinstance(model, CostWiseForCausalLM) and model.config.tie_word_embeddings
    if is_tied and adapter.names(VOCABULARY):
        _untie(peft_model)
        model.config.tie_word_embeddings = False  # peft does not merge into matrices that are tied
    try:
        merged = peft_model.merge_and_unload()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"the adapter {adapter.path} cannot be merged into the model: {error}") from error
    if is_tied:
        embedding, head = merged.get_input_embeddings().weight, merged.lm_head.weight
        merged.config.tie_word_embeddings = torch.equal(embedding, head)
    return merged


def _untie(peft_model: PeftModel) -> None:
    """Give a tied vocabulary head its own matrix, as a model with an adapter that is not merged computes."""
    language_model: Any = peft_model.get_base_model()
    of_embedding = {id(parameter) for parameter in language_model.get_input_embeddings().parameters()}
    for module in language_model.lm_head.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and id(weight) in of_embedding:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _is_cut(name: str, config: CostWiseConfig, depth: int) -> bool:
    """Whether a weight belongs to a layer, or to a head of an exit, that is not loaded."""
    if config.num_hidden_layers == depth:
        return False
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None:
        return config.num_hidden_layers <= int(layer[1]) < depth
    head = re.match(r"lm_head\.(\d+)\.", name)
    return head is not None and config.layer_wise and int(head[1]) >= len(config.exit_layers)


@contextmanager
def _no_warnings_of_ties() -> Iterator[None]:
    """Silence peft's warnings about tied embeddings, which `merge` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def token_adapter_ratio(path: str, **hub: Any) -> int | None:
    """The ratio that an adapter makes up for, as fine-tuning noted beside it; None for any other adapter."""
    compensation = _noted(path, **hub).get("compensation") or {}
    return compensation.get("compress_ratio") if compensation.get("axis") == "token" else None


def _noted(adapter: str, **hub: Any) -> dict[str, Any]:
    """The model's configuration, as fine-tuning wrote it beside an adapter; empty where another program wrote it."""
    file = find_file(adapter, CONFIG_NAME, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def token_adapter_ratios(model: CostWiseForCausalLM) -> set[int]:
    """The ratios that a model has adapters attached for."""
    return {
        ratio
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for ratio in COMPRESS_RATIOS
        if token_adapter_name(ratio) in adapters_of(layer)
    }


def use_token_adapter(model: CostWiseForCausalLM, ratio: int) -> None:
    """Let the adapter that is attached for `ratio` act, alone, or none where there is none. No weight changes."""
    name = token_adapter_name(ratio)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            present = name in adapters_of(layer)
            layer.enable_adapters(present)
            if present:
                layer.set_adapter(name, inference_mode=True)


def token_adapter_name(ratio: int) -> str:
    return f"token_{ratio}"
