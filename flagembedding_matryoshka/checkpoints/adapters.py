"""Adapters: their configuration, merging them, and switching between them."""

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

from flagembedding_matryoshka.checkpoints.gguf import checked, locate, resolve
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
"""Types of adapters that can be merged. For each of them a merged model was compared with peft's."""
PICKLED = (
    "the weights of {path} are pickled ({file}), and a pickle can run code when it is read. If its source can be "
    "trusted, give allow_pickle=True (--allow_pickle). Otherwise ask for {instead}."
)
PREFIX = "base_model.model."
VOCABULARY = ("embed_tokens", "lm_head")


class Adapter(NamedTuple):
    """The content of an adapter's files.

    Attributes:
        path: path or name, as the caller gives it.
        config: the adapter_config.json.
        weights: tensors by peft's names without "base_model.model.".
        of_exits: whether the adapter was trained on a layer-wise model, with its scoring heads.
    """

    path: str
    config: PeftConfig
    weights: dict[str, Tensor]
    of_exits: bool

    @property
    def has_score(self) -> bool:
        """Whether the adapter has the head of a sequence classifier."""
        return any(name.startswith("score.") for name in self.weights)

    def names(self, parts: Collection[str]) -> list[str]:
        """Return the names of weights in modules of these names."""
        return [name for name in self.weights if not {*name.split(".")}.isdisjoint(parts)]

    def rows(self, module: str) -> int:
        """Return the rows of the adapter's "embed_tokens" (embedding) or "lm_head" (vocabulary head); 0 without one."""
        pattern = re.compile(
            rf"(.*\.)?{module}\.((token_adapter\.)?base_layer\.|original_module\.|modules_to_save\.)?weight"
        )
        return max((len(weight) for name, weight in self.weights.items() if pattern.fullmatch(name)), default=0)

    @property
    def vocabulary_size(self) -> int:
        """Vocabulary size of the language model that the adapter was trained on; 0 if it is unknown."""
        return 0 if self.of_exits else self.rows("embed_tokens") or self.rows("lm_head")


def base_of(adapter: str, **hub: Any) -> tuple[str, str | None]:
    """Return the base in an adapter's configuration, and the base's revision, or None.

    Raises:
        FileNotFoundError: if the base is a path that does not exist.
        ValueError: if the configuration has no base, or adapters of this type cannot be merged.
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
    """Find the configuration of a base with its adapter.

    Fine-tuning in this package writes a config.json into the adapter's directory. Other programs, such as
    FlagEmbedding's runners, do not. The configuration is then that of the base.

    Args:
        adapter: the adapter's directory or name.
        base, base_revision: the result of `base_of`.
        hub: as in `hub_options`; `revision` is of the adapter.

    Returns:
        the directory or name that has the configuration, and the options of `hub` for it.

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
    """Return the file of an adapter's weights.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        file = find_file(adapter, name, **hub)
        if file is not None:
            return Path(file)
    raise FileNotFoundError(
        f"the adapter {adapter} has no weights: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}."
    )


def refuse_other_heads(adapter: str, config: CostWiseConfig, **hub: Any) -> None:
    """Refuse an adapter that was fine-tuned with other exits than the model's.

    peft finds heads by their number, so it would put weights of other exits into the wrong heads.

    Raises:
        ValueError: if the exits in the adapter's config.json do not begin with the exits of `config`.
    """
    if _noted(adapter, **hub).get("layer_wise"):
        exits = read_config(adapter, **hub).exit_layers
        if exits[: len(config.exit_layers)] != config.exit_layers:
            raise ValueError(f"the adapter {adapter} is for the exits {exits}, but the model has {config.exit_layers}.")


def refuse_other_head(adapter: Adapter, model: str, after: str | None = None) -> None:
    """Refuse an adapter that changes the head of a language model or classifier, if the model is layer-wise.

    Args:
        model: name of the model, for the error.
        after: path of the first adapter of the layer-wise model; None if the checkpoint is layer-wise.

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
        ValueError: if adapters of this type cannot be merged, or the weights are pickled and `allow_pickle` is False.
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
    """Return whether an adapter was trained on a sequence classifier and has its head. Raises as `read_adapter`."""
    return _config(path, **hub).task_type == TaskType.SEQ_CLS and read_adapter(path, allow_pickle, **hub).has_score


def _config(adapter: str, **hub: Any) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        ValueError: if adapters of this type cannot be merged.
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
    """Add an adapter to a model without merging it.

    Args:
        model: a layer-wise model, or a language model or classifier with the module names of transformers.
        depth: number of layers of the whole checkpoint. The model may have fewer; weights of other layers are left out.
        name: name of the adapter in the model.
        is_trainable: whether the adapter is trained.

    Raises:
        ValueError: if the adapter has weights that no module of the model takes, lacks weights of modules that its
            configuration names, or has weights of other shapes.
    """
    config: Any = adapter.config
    kind = type(model).__name__.removeprefix("_")
    weights = {PREFIX + key: value for key, value in adapter.weights.items() if not _is_cut(key, model.config, depth)}
    if adapter.has_score and "score" not in (config.modules_to_save or ()) and f"{PREFIX}score.weight" in weights:
        # Older releases of peft train the head of every SEQ_CLS model, but do not name it in the configuration.
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
    # A trainer that resized the vocabulary also saves embedding and head, under their names inside peft.
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
    """Merge an adapter into the weights of a model, and return the model.

    If a language model ties head and embedding, and the adapter changes one of them, the result has two matrices.

    Args:
        model, depth: as in `attach`.

    Raises:
        ValueError: as in `attach`, or if peft cannot merge the adapter.
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
    """Give a tied vocabulary head a matrix of its own, as peft computes it before a merge."""
    language_model: Any = peft_model.get_base_model()
    of_embedding = {id(parameter) for parameter in language_model.get_input_embeddings().parameters()}
    for module in language_model.lm_head.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and id(weight) in of_embedding:
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _is_cut(name: str, config: CostWiseConfig, depth: int) -> bool:
    """Return whether a weight is of a layer, or of an exit's head, that is not loaded."""
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
    """Return the compression ratio that an adapter compensates for, by its config.json; None for other adapters."""
    compensation = _noted(path, **hub).get("compensation") or {}
    return compensation.get("compress_ratio") if compensation.get("axis") == "token" else None


def _noted(adapter: str, **hub: Any) -> dict[str, Any]:
    """Return the config.json that fine-tuning wrote beside an adapter; {} without this file."""
    file = find_file(adapter, CONFIG_NAME, **hub)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def token_adapter_ratios(model: CostWiseForCausalLM) -> set[int]:
    """Return the compression ratios for which a model has token adapters."""
    return {
        ratio
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for ratio in COMPRESS_RATIOS
        if token_adapter_name(ratio) in adapters_of(layer)
    }


def use_token_adapter(model: CostWiseForCausalLM, ratio: int) -> None:
    """Use the token adapter of `ratio` only, or no adapter if there is none. No weight changes."""
    name = token_adapter_name(ratio)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            present = name in adapters_of(layer)
            layer.enable_adapters(present)
            if present:
                layer.set_adapter(name, inference_mode=True)


def token_adapter_name(ratio: int) -> str:
    return f"token_{ratio}"
