"""Loading of checkpoints: raw models, layer-wise models, and directories that fine-tuning wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    has_file,
    logging,
)
from transformers.utils.peft_utils import find_adapter_config_file

from flagembedding_matryoshka.checkpoints.adapters import (
    PICKLED,
    Adapter,
    attach,
    base_of,
    merge,
    place_of_config,
    read_adapter,
    refuse_other_head,
    refuse_other_heads,
    token_adapter_name,
    token_adapter_ratio,
    trains_classifier,
    use_token_adapter,
)
from flagembedding_matryoshka.checkpoints.describing import (
    MODULES_FILE,
    Architecture,
    Description,
    Files,
    describe,
    is_classifier,
    refuse_other_classifiers,
)
from flagembedding_matryoshka.checkpoints.gguf import checked, locate, resolve
from flagembedding_matryoshka.models.backbones import causal_lm_class, read_config
from flagembedding_matryoshka.models.causal_lm import CostWiseForCausalLM
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.models.minicpm import MINICPM
from flagembedding_matryoshka.models.self_check import self_check
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.text.pairs import find_head_token_ids
from flagembedding_matryoshka.text.templates import Template

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and how to load it.

    Attributes:
        path: path or name of the checkpoint.
        base: path or name of the weights that adapters are merged into. Without adapters it is the checkpoint itself.
        adapters: LoRA adapters to merge, in order.
        config: configuration of the layer-wise model to build.
        description: facts about the checkpoint.
        from_raw: whether `base` is a raw language model, whose heads are made when it is loaded.
        revisions: {name on the hub: revision to read}; the newest revision of other names.
        allow_pickle: whether weights may be read from pickled files if there are no safetensors.
    """

    path: str
    base: str
    config: CostWiseConfig
    description: Description
    from_raw: bool
    adapters: list[str] = field(default_factory=list)
    revisions: dict[str, str] = field(default_factory=dict)
    allow_pickle: bool = False

    def hub_of(self, place: str, hub: Mapping[str, Any]) -> dict[str, Any]:
        """Return `hub` with the revision of the base or of an adapter, which `place` names."""
        return hub_options(**{**hub, "revision": self.revisions.get(place)})


def hub_options(
    cache_dir: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Return the given options of the hub as keyword arguments of transformers and peft."""
    given = {"cache_dir": cache_dir, "token": token, "revision": revision, "local_files_only": local_files_only or None}
    return {name: value for name, value in given.items() if value is not None}


def inspect_checkpoint(
    path: str | PathLike[str],
    from_raw: bool | None = None,
    start_layer: int | None = None,
    layer_sep: int | None = None,
    max_layer: int | None = None,
    exits: Sequence[int] | None = None,
    template: str | PathLike[str] | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **hub: Any,
) -> Checkpoint:
    """Read the files of a checkpoint without its weights, and decide how to load it.

    Args:
        path: a local directory, a name on the hub, a GGUF file, which is then converted, or a name of
            [`~flagembedding_matryoshka.checkpoints.gguf.locate`].
        from_raw: True requires a raw, False a layer-wise checkpoint; None accepts either.
        start_layer, layer_sep: evenly spaced exits for a raw checkpoint. None is 4 and 1; a layer-wise checkpoint has
            its own exits.
        max_layer: layers above this one are not loaded.
        exits: list of exits for a raw checkpoint; layers above the last exit are not loaded. The last exit of a
            layer-wise checkpoint must stay the last. New exits start with a copy of its head.
        template: template around query and passage, see
            [`~flagembedding_matryoshka.text.templates.Template.load`]; None is the checkpoint's own.
        trust_remote_code: as in transformers, for the tokenizer only.
        allow_pickle: whether weights of the checkpoint and its adapters may be read from pytorch_model.bin and
            adapter_model.bin if there are no safetensors.
        hub: as in `hub_options`; `revision` is of `path`. The revision of a base is in the adapter's configuration.

    Raises:
        FileNotFoundError: if neither this machine nor the hub has the checkpoint, or the base of its adapters, or
            there is no template of the name.
        ImportError: if the package `gguf` is missing for a GGUF file, or the package of a name.
        ValueError: if there is no backbone for the checkpoint, it is of another kind or has other exits than the
            arguments say, it is a re-ranker whose template is unknown, a GGUF file cannot be converted, or a revision
            is given for a local path.
    """
    adapters: list[str] = []
    given = checked(path)
    base, path = given, locate(given)
    revisions = {given: hub.get("revision")}
    readable = resolve(path, hub.get("cache_dir"))
    if hub.get("revision") is not None and Path(readable).exists():
        raise ValueError(f"revision={hub['revision']!r}, but {readable} is a path: only names on the hub have one.")
    described, of_described = readable, dict(hub)
    if find_adapter_config_file(readable, **hub) is not None:
        base, revision = base_of(readable, **hub)
        adapters.append(path)
        revisions = {path: hub.get("revision"), base: revision}
        described, of_described = place_of_config(readable, base, revision, **hub)
    if Path(described).is_dir() and not Path(described, CONFIG_NAME).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: the directory has no {CONFIG_NAME}.")
    try:
        config = read_config(described, **of_described)
        stored, _ = PreTrainedConfig.get_config_dict(described, **of_described)
    except OSError as error:
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: neither a file or directory here with a config.json, nor a model "
            f"of that name that could be read from the hub. ({error})"
        ) from error
    refuse_other_classifiers(path, stored)
    architecture: Architecture = "layer-wise" if config.layer_wise else "causal language model"
    if is_classifier(stored) or (adapters and not config.layer_wise and trains_classifier(path, allow_pickle, **hub)):
        architecture = "sequence classification"
        config.become_classifier()
    is_raw = not config.layer_wise
    if from_raw is not None and from_raw != is_raw:
        kind = {
            "causal language model": "a raw checkpoint without heads",
            "layer-wise": "a layer-wise checkpoint that has its heads",
            "sequence classification": "a sequence classifier, which has its head",
        }[architecture]
        raise ValueError(f"from_raw={from_raw}, but {path} is {kind}.")
    if is_raw:
        config.layer_wise = True
        config.start_layer = config.start_layer if start_layer is None else start_layer
        config.layer_sep = config.layer_sep if layer_sep is None else layer_sep
        config.exits = None if exits is None else list(exits)
        if exits is not None:
            if (start_layer, layer_sep, max_layer) != (None, None, None):
                raise ValueError(
                    f"exits={config.exits} say all: leave out start_layer={start_layer}, layer_sep={layer_sep} and "
                    f"max_layer={max_layer}."
                )
            max_layer = config.exit_layers[-1]
    else:
        _refuse_other_exits(path, config, start_layer, layer_sep)
        if exits is not None and list(exits) != config.exit_layers:
            _use_other_exits(path, config, exits, adapters)
    if max_layer is not None:
        if config.base_exits is not None:
            raise ValueError(
                f"max_layer={max_layer}: new exits of {path} start as its deepest, {config.base_exits[-1]}, which "
                "would be left out. Write the model whole first, with MatryoshkaReranker.export."
            )
        _cut(config, max_layer)
    names = [base, str(Path(readable).resolve())] if Path(readable).exists() else [base]
    files = Files(readable, hub)
    if described != readable and files.path(MODULES_FILE) is None:  # CrossEncoder writes its files beside an adapter
        files = Files(described, of_described)
    description = describe(path, files, stored, config, architecture, template, names, trust_remote_code)
    config.template = description.template.value.to_json()
    pinned = {place: revision for place, revision in revisions.items() if revision is not None}
    return Checkpoint(path, base, config, description, is_raw, [*config.raw_peft, *adapters], pinned, allow_pickle)


def _refuse_other_exits(path: str, config: CostWiseConfig, start_layer: int | None, layer_sep: int | None) -> None:
    for name, asked in (("start_layer", start_layer), ("layer_sep", layer_sep)):
        if asked not in (None, getattr(config, name)) or (asked is not None and config.exits is not None):
            raise ValueError(
                f"{name}={asked}, but the heads of {path} were trained with "
                f"{f'{name}={getattr(config, name)}' if config.exits is None else f'exits={list(config.exits)}'}. "
                "These can be chosen for a raw checkpoint only."
            )


def _use_other_exits(path: str, config: CostWiseConfig, exits: Sequence[int], adapters: Sequence[str]) -> None:
    if adapters or config.base_exits is not None:
        raise ValueError(
            f"exits={list(exits)}, but {path} holds an adapter that was trained for {config.exit_layers}. Write the "
            "model whole first, with MatryoshkaReranker.export, and give that other exits."
        )
    own = config.exit_layers
    if not exits or exits[-1] != own[-1]:
        raise ValueError(
            f"exits={list(exits)}, but the deepest exit of {path} is {own[-1]}: it must be the last of them, since the "
            "heads of new exits start as its head."
        )
    config.base_exits, config.exits = own, list(exits)
    config.exit_layers  # noqa: B018 - raises where they do not exist


def _cut(config: CostWiseConfig, max_layer: int) -> None:
    shallowest = config.exit_layers[0]
    if not shallowest <= max_layer <= config.num_hidden_layers:
        raise ValueError(
            f"max_layer={max_layer} leaves no exit or no layer to load: it must lie between the shallowest exit "
            f"{shallowest} and the model's {config.num_hidden_layers} layers."
        )
    config.cut(max_layer)


def load_tokenizer(
    path: str | PathLike[str], trust_remote_code: bool = False, use_fast: bool = True, **hub: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, which pads on the right.

    Adapters without a tokenizer have that of their base.
    """
    readable = resolve(locate(checked(path)), hub.get("cache_dir"))
    if (
        find_adapter_config_file(readable, **hub) is not None
        and find_file(readable, "tokenizer_config.json", **hub) is None
    ):
        base, revision = base_of(readable, **hub)
        return load_tokenizer(base, trust_remote_code, use_fast, **hub_options(**{**hub, "revision": revision}))
    if _is_llama_sentencepiece(readable, **hub):
        return LlamaTokenizer.from_pretrained(readable, padding_side="right", **hub)
    # transformers has no MiniCPM, so AutoTokenizer would warn about its configuration.
    stored = Files(readable, hub).json(CONFIG_NAME) or {}  # adapters may have a tokenizer and no config.json
    config = read_config(readable, **hub) if stored.get("model_type") == MINICPM else None
    return AutoTokenizer.from_pretrained(
        readable,
        config=config,
        trust_remote_code=trust_remote_code,
        use_fast=use_fast,
        padding_side="right",
        **hub,
    )


def depth_of(checkpoint: Checkpoint, **hub: Any) -> int:
    """Return the number of decoder layers that a checkpoint stores. Fewer layers may be loaded."""
    base = resolve(locate(checkpoint.base), hub.get("cache_dir"))
    return read_config(base, **checkpoint.hub_of(checkpoint.base, hub)).num_hidden_layers


def _is_llama_sentencepiece(path: str, **hub: Any) -> bool:
    """Return whether a checkpoint's tokenizer is a LlamaTokenizer's SentencePiece model without a tokenizer.json.

    FlagEmbedding's decoder-only runner saves such tokenizers. For some model types, such as Mistral, AutoTokenizer of
    transformers 5 ignores the class that the checkpoint names. It then puts no space before a text, which changes its
    tokens.
    """
    file = find_file(path, "tokenizer_config.json", **hub)
    if file is None:
        return False
    declared = json.loads(Path(file).read_text(encoding="utf-8")).get("tokenizer_class") or ""
    if declared.removesuffix("Fast") != "LlamaTokenizer":
        return False
    found = [find_file(path, name, **hub) is not None for name in ("tokenizer.json", "tokenizer.model")]
    return found == [False, True]


def load_model(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    peft_paths: Sequence[str | PathLike[str]] = (),
    attach_token_adapters: bool = False,
    **hub: Any,
) -> CostWiseForCausalLM:
    """Load the weights and merge the checkpoint's own adapters, then `peft_paths`, one after another.

    Adapters of a raw language model or a sequence classifier are merged before its head becomes the heads of exits.
    Adapters of the layer-wise model are merged after that, so they come later in the order.

    Args:
        hub: as in `hub_options`, without a revision; `Checkpoint.revisions` has them.
        attach_token_adapters: whether adapters that compensate for a compression ratio stay separate. They are switched
            off until `use_token_adapter` chooses one. False merges them as other adapters.

    Raises:
        FileNotFoundError: if an adapter has no adapter_config.json or no weights.
        ValueError: if an adapter cannot be merged, is for another model, for the heads of other exits, or changes the
            vocabulary head of a model that has none; if two attached adapters are for one ratio; if the tokenizer has
            tokens without an embedding; or if weights are pickled and the checkpoint does not allow it.
    """
    logger.info(checkpoint.description.summary)
    paths = [*checkpoint.adapters, *(locate(checked(path)) for path in peft_paths)]
    for path in paths:
        if find_adapter_config_file(path, **checkpoint.hub_of(path, hub)) is None:
            raise FileNotFoundError(f"there is no adapter (adapter_config.json) at {path}")
        refuse_other_heads(path, checkpoint.config, **checkpoint.hub_of(path, hub))
    adapters = [read_adapter(path, checkpoint.allow_pickle, **checkpoint.hub_of(path, hub)) for path in paths]
    config = checkpoint.config
    if checkpoint.from_raw and config.head_token_id is None:
        config.head_token_id = find_head_token_ids(tokenizer, Template.load(config.template).head_tokens)
    located = locate(checkpoint.base)
    base = resolve(located, hub.get("cache_dir"))
    of_base = checkpoint.hub_of(checkpoint.base, hub)
    if not checkpoint.allow_pickle:
        refuse_pickled(checkpoint.base, base, **of_base)
    stored, depth = read_config(base, **of_base), depth_of(checkpoint, **hub)
    _refuse_other_vocabulary(checkpoint, stored, tokenizer, adapters)
    self_check(causal_lm_class(config), config)
    remaining = list(adapters)

    def adapt(model: Any) -> Any:
        while remaining and not remaining[0].of_exits:
            if remaining[0].has_score and isinstance(model, CostWiseForCausalLM):
                raise ValueError(
                    f"the adapter {remaining[0].path} brings the head of a sequence classifier, but {checkpoint.path} "
                    "is loaded as a language model. Give the adapter's directory itself as the model."
                )
            model = merge(model, remaining.pop(0), depth)
        return model

    model = causal_lm_class(config).from_pretrained(
        base,
        config=config,
        dtype=dtype,
        adapt=adapt,
        as_classifier=bool(checkpoint.adapters) and adapters[0].has_score,
        use_safetensors=None if checkpoint.allow_pickle else True,
        **of_base,
    )
    # Adapters that are trained on the model note this as their base: an absolute path, or a name for any machine, but
    # not the cache of a converted GGUF file.
    if located != checkpoint.base:
        model.name_or_path = checkpoint.base
    elif Path(located).exists():
        model.name_or_path = str(Path(located).absolute())
    attached: dict[int, Adapter] = {}
    for adapter in remaining:
        refuse_other_head(adapter, checkpoint.base, None if stored.layer_wise else remaining[0].path)
        ratio = None
        if attach_token_adapters:
            ratio = token_adapter_ratio(adapter.path, **checkpoint.hub_of(adapter.path, hub))
        if ratio is None:
            model = merge(model, adapter, depth)
        elif ratio in attached:
            raise ValueError(
                f"{attached[ratio].path} and {adapter.path} are both token adapters for compress_ratio={ratio}."
            )
        else:
            attached[ratio] = adapter
    for ratio, adapter in attached.items():
        # Adapters go into the model's own layers; the wrapper around it is not needed.
        attach(model, adapter, depth, token_adapter_name(ratio))
    if attached:
        use_token_adapter(model, 1)
    return model.eval()


def refuse_pickled(model: str, place: str, folder: str = "", **hub: Any) -> None:
    """Refuse weights that are only in pickled files. No file is fetched.

    Args:
        model: the model, as the caller names it.
        place: directory of the model, or its name on the hub.
        folder: folder of the weights in `place`.
        hub: `cache_dir`, `token`, `revision`, … as in transformers.

    Raises:
        OSError: if the hub does not have the model.
        ValueError: naming the first pickled file.
    """
    prefix = f"{folder}/" if folder else ""
    if any(has_file(place, prefix + name, **hub) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if has_file(place, prefix + name, **hub):
            raise ValueError(PICKLED.format(path=model, file=prefix + name, instead=prefix + SAFE_WEIGHTS_NAME))


def _refuse_other_vocabulary(
    checkpoint: Checkpoint, stored: CostWiseConfig, tokenizer: PreTrainedTokenizerBase, adapters: Sequence[Adapter]
) -> None:
    """Raise ValueError if texts or the score need tokens that neither the base (`stored`) nor an adapter has."""
    embeddings, rows = (
        max([stored.vocab_size, *(adapter.rows(module) for adapter in adapters if not adapter.of_exits)])
        for module in ("embed_tokens", "lm_head")
    )
    if stored.tie_word_embeddings:
        embeddings = rows = max(embeddings, rows)
    # Special tokens need no embedding: texts do not become them, and padding is not embedded.
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    of_text = set(tokenizer.get_vocab().values()) - special
    if beyond := [index for index in of_text if index >= embeddings]:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but {checkpoint.base} has embeddings of {embeddings}: "
            f"{len(beyond)} tokens that texts become have none. It belongs to another model."
        )
    head = checkpoint.config.head_token_id if checkpoint.from_raw else None
    if beyond := [index for index in ([head] if isinstance(head, int) else head or ()) if index >= rows]:
        raise ValueError(
            f"the score is the logit of the tokens {beyond}, but the vocabulary head of {checkpoint.base} with its "
            f"adapters has {rows} rows."
        )
