"""What a checkpoint says of itself, read from its files without its weights, and where each fact comes from.

What a model was trained with is what it is scored with. Template, instruction and head tokens come from the first of
these sources that knows them: the caller; the checkpoint's own configuration; the files of sentence-transformers; the
chat template; the names of published re-rankers in the configuration, the path and the model card. A raw language model
of which none of them knows anything gets the template "cost_wise" with a warning; a checkpoint that is a re-ranker
already is refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from flagembedding_matryoshka.checkpoints.chat_templates import template_from_chat, template_of_pairs
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.text.templates import TEMPLATES, Template, of_head

T = TypeVar("T")
Architecture = Literal["layer-wise", "sequence classification", "causal language model"]
CLASSIFIER = "ForSequenceClassification"
ASSUMED = "assumed"
MODULES_FILE = "modules.json"
MODULE_SETTINGS_FILE = "matryoshka_config.json"
MAX_LENGTH = 512
"""Tokens of query and passage, where a checkpoint does not say."""
OF_A_MODULE = ("query_instruction", "passage_instruction", "prompt")
"""Fields of a template that `MatryoshkaModule` saves in it."""
OURS = "flagembedding_matryoshka."


class Published(NamedTuple):
    """A line of published re-rankers.

    Attributes:
        name: how their names go, in lower case.
        template: the name of theirs.
        backbones: their model types.
    """

    name: str
    template: str
    backbones: tuple[str, ...]


PUBLISHED = (
    Published("matroyshka-reranker", "cost_wise", ("mistral",)),
    Published("qwen3-reranker", "qwen3-reranker", ("qwen3",)),
    Published("zerank", "zerank", ("qwen3",)),
    Published("mxbai-rerank-base-v2", "mxbai-v2", ("qwen2",)),
    Published("mxbai-rerank-large-v2", "mxbai-v2", ("qwen2",)),
    Published("ctxl-rerank-v2", "ctxl-v2", ("qwen3", "mistral")),
    Published("bge-reranker-v2-gemma", "bge-gemma", ("gemma",)),
    Published("bge-reranker-v2-minicpm-layerwise", "minicpm", ("minicpm",)),
    Published("bge-reranker-v2.5-gemma2-lightweight", "gemma2-lightweight", ("gemma2", "cost_wise_gemma")),
)


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A value, and the file or name that it was read from."""

    value: T
    source: str


@dataclass(frozen=True)
class Description:
    """What is known of a checkpoint.

    Attributes:
        backbone: the model type of its decoder.
        architecture: "layer-wise" (ours, or FlagEmbedding's published), "sequence classification" or "causal language
            model".
        exits: the layers at which a score can be read.
        heads: what the scoring heads are made of.
        causality: "causal"; any other is refused.
        template: the words around query and passage; its `instruction` is the one of calls that give none.
        template_name: the name of a known template, else None.
        instruction: the same instruction, with its own source.
        head_tokens: the tokens whose logits the score is made of, for a model whose heads are not stored.
        activation: the function that the checkpoint applies to raw scores, "identity" or "sigmoid" or a dotted path.
        dtype: of the stored weights.
        quantization: the method that the stored weights are quantized by; None if they are not.
        max_length, query_max_length: lengths that the checkpoint was saved with; None if it says nothing.
    """

    path: str
    backbone: Fact[str]
    architecture: Fact[Architecture]
    exits: Fact[tuple[int, ...]]
    heads: Fact[str]
    causality: Fact[str]
    template: Fact[Template]
    template_name: Fact[str | None]
    instruction: Fact[str]
    head_tokens: Fact[tuple[str | int, ...]]
    activation: Fact[str]
    dtype: Fact[str | None]
    quantization: Fact[str | None]
    max_length: Fact[int | None]
    query_max_length: Fact[int | None]

    @property
    def is_assumed(self) -> bool:
        """Whether nothing says which template the model was trained with."""
        return self.template.source == ASSUMED

    @property
    def assumption(self) -> str:
        """What to tell a user of an assumed template."""
        return (
            f"nothing in {self.path} says which template the model was trained with: 'cost_wise' is assumed, whose "
            f"scores mean nothing before fine-tuning. Name another by template= or --template: a JSON file or one of "
            f"{', '.join(TEMPLATES)}."
        )

    @property
    def summary(self) -> str:
        """One line of a log."""
        name = self.template_name.value or "of its own"
        return (
            f"{self.path}: {self.backbone.value}, {self.architecture.value}, exits {list(self.exits.value)}, template "
            f"{name} [{self.template.source}], instruction {self.instruction.value!r} [{self.instruction.source}]"
        )

    def warn(self) -> None:
        """Warn once where the template is assumed."""
        if self.is_assumed:
            warnings.warn(self.assumption, UserWarning, stacklevel=3)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Name, value and source of each fact, as text."""
        for field in fields(self):
            fact = getattr(self, field.name)
            if not isinstance(fact, Fact) or (fact.value is None and field.name == "query_max_length"):
                continue
            name, value, source = field.name.replace("_", " "), fact.value, fact.source
            if field.name == "max_length" and value is None:
                value, source = MAX_LENGTH, "default"
            elif isinstance(value, Template):
                name, value = "words", repr(value.words)
            elif field.name == "template_name":
                name, value = "template", value or "its own"
            elif field.name == "head_tokens":
                if self.architecture.value != "causal language model":
                    continue
                value = of_head(value)
            elif field.name == "dtype":
                name = "stored dtype"
            elif field.name == "activation" and self.template.value.temperature != 1:
                value = f"{value}; the sigmoid is of score ÷ {self.template.value.temperature:g}"
            elif field.name == "exits":
                value = ", ".join(map(str, value))
            elif field.name == "instruction" and value == "":
                value = "none" if self.template.value.instructed is not None else "none, and no place for one"
            elif value is None:
                value = "none"
            yield name, str(value), source

    def to_json(self) -> dict[str, dict[str, Any]]:
        """{fact: {"value", "source"}}, as JSON can hold it."""
        found: dict[str, dict[str, Any]] = {}
        for field in fields(self):
            fact = getattr(self, field.name)
            if isinstance(fact, Fact):
                value = fact.value.to_json() if isinstance(fact.value, Template) else fact.value
                found[field.name] = {"value": value, "source": fact.source}
        return found


class Files:
    """The small files of a checkpoint: a directory, or a name on the hub.

    Args:
        hub: `cache_dir`, `token`, … as in transformers.
    """

    def __init__(self, place: str, hub: Mapping[str, Any]) -> None:
        self.place = place
        self._hub = dict(hub)

    def path(self, name: str) -> Path | None:
        """Where a file lies; None if the checkpoint has none of that name."""
        found = cached_file(self.place, name, _raise_exceptions_for_missing_entries=False, **self._hub)
        return None if found is None else Path(found)

    def text(self, name: str) -> str | None:
        """What a file holds."""
        path = self.path(name)
        return None if path is None else path.read_text(encoding="utf-8", errors="replace")

    def json(self, name: str) -> Any:
        """What a JSON file holds; None without the file.

        Raises:
            ValueError: if it is no JSON.
        """
        text = self.text(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name} of {self.place} is no JSON: {error}") from error

    def tokenizer(self, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        """The tokenizer beside the checkpoint."""
        return AutoTokenizer.from_pretrained(self.place, trust_remote_code=trust_remote_code, **self._hub)


class Found(NamedTuple):
    """A template, and what says it.

    Attributes:
        name: of a known template, else None.
        instruction: the instruction of calls that give none, and what says it.
        head_source: what says the head tokens, if it is another source.
    """

    template: Template
    source: str
    name: str | None = None
    instruction: Fact[str] | None = None
    head_source: str | None = None


def is_classifier(stored: Mapping[str, Any]) -> bool:
    """Whether a stored configuration is one of a sequence classifier of transformers.

    Fine-tuning leaves the architecture of its base in a layer-wise configuration.
    """
    return not stored.get("layer_wise") and any(
        str(name).endswith(CLASSIFIER) for name in stored.get("architectures") or ()
    )


def refuse_other_classifiers(path: str, stored: Mapping[str, Any]) -> None:
    """Raise ValueError unless a sequence classifier has one label, read at the last token."""
    if not is_classifier(stored):
        return
    name = stored["architectures"][0]
    labels = stored.get("num_labels", len(stored.get("id2label") or (0, 1)))
    if labels != 1:
        raise ValueError(
            f"{path} holds a {name} with {labels} labels (id2label of its config.json): a re-ranker has one. A "
            "checkpoint with num_labels=1 is loaded."
        )
    for field in ("pooling", "pooling_mode", "pooling_type"):
        if stored.get(field) not in (None, "last", "lasttoken", "last_token"):
            raise ValueError(
                f"{path} holds a {name} with {field}={stored[field]!r}: a score is read at the last token, and "
                "a model that was trained with other pooling cannot be read there."
            )


def describe(
    path: str,
    files: Files,
    stored: Mapping[str, Any],
    config: CostWiseConfig,
    architecture: Architecture,
    template: str | PathLike[str] | Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Description:
    """Describe a checkpoint.

    Args:
        path: as the caller names it.
        stored: its config.json, or that of its base.
        config: the model that will be loaded, with its exits.
        template: the caller's; None is the checkpoint's own.
        names: others under which it is known: that of its base, …
        trust_remote_code: as in transformers, for the tokenizer alone.

    Raises:
        ValueError: if the checkpoint is a re-ranker whose template cannot be known, or its files contradict what a
            re-ranker is.
    """
    modules = _modules(files)
    module_settings = (files.json(MODULE_SETTINGS_FILE) or {}) if _is_ours(modules) else {}
    found = _template(path, files, stored, config, architecture, modules, template, names, trust_remote_code)
    words = found.template
    if module_settings and template is None:
        changed = words.replaced(**{name: module_settings.get(name) for name in OF_A_MODULE})
        if changed != words:
            found = found._replace(template=changed, source=MODULE_SETTINGS_FILE, name=None)
            words = changed
    instruction = found.instruction or Fact(words.default_instruction, found.source)
    if found.instruction is not None and instruction.value != words.instruction:
        words = Template.load(words.to_json() | {"instruction": instruction.value})
    activation = _activation(files, stored, modules)
    quantization = (stored.get("quantization_config") or {}).get("quant_method")
    made = "start_layer and layer_sep, by default 4 and 1; of these only the deepest was trained"
    exits_source = made if architecture == "causal language model" else "config.json"
    return Description(
        path=path,
        backbone=Fact(str(stored.get("model_type")), "model_type in config.json"),
        architecture=Fact(
            architecture, f"{'layer_wise' if architecture == 'layer-wise' else 'architectures'} in config.json"
        ),
        exits=Fact(tuple(config.exit_layers), exits_source),
        heads=_heads(architecture, words),
        causality=Fact("causal", "the backbone"),
        template=Fact(words, found.source),
        template_name=Fact(found.name or _name_of(words), found.source),
        instruction=instruction,
        head_tokens=Fact(words.head_tokens, found.head_source or found.source),
        activation=activation,
        dtype=Fact(stored.get("dtype") or stored.get("torch_dtype"), "config.json"),
        quantization=Fact(quantization, "quantization_config in config.json" if quantization else "config.json"),
        max_length=Fact(module_settings.get("max_length"), MODULE_SETTINGS_FILE),
        query_max_length=Fact(module_settings.get("query_max_length"), MODULE_SETTINGS_FILE),
    )


def _heads(architecture: Architecture, template: Template) -> Fact[str]:
    if architecture == "layer-wise":
        return Fact("one linear map for each exit", "lm_head in the weights")
    if architecture == "sequence classification":
        return Fact("one linear map at the last layer", "score in the weights")
    return Fact(f"rows of the vocabulary head: {of_head(template.head_tokens)}", "the template")


def _name_of(template: Template) -> str | None:
    return next((name for name, known in TEMPLATES.items() if known == template), None)


def _template(
    path: str,
    files: Files,
    stored: Mapping[str, Any],
    config: CostWiseConfig,
    architecture: Architecture,
    modules: Sequence[Mapping[str, Any]] | None,
    given: str | PathLike[str] | Mapping[str, Any] | None,
    names: Sequence[str],
    trust_remote_code: bool,
) -> Found:
    """The first source that knows the template."""
    if given is not None:
        name = given if isinstance(given, str) and given in TEMPLATES else None
        return Found(Template.load(given), "the caller", name)
    if architecture == "layer-wise":
        name = config.template if isinstance(config.template, str) else None
        source = "template in config.json" if "template" in stored else f"model_type {stored.get('model_type')!r}"
        return Found(Template.load(config.template), source, name, _saved_instruction(files, modules, config))
    if modules is not None and not _is_ours(modules):
        return _of_sentence_transformers(files, modules, trust_remote_code, architecture)
    chat = files.text("chat_template.jinja") or ""
    if not chat:
        inside = (files.json("tokenizer_config.json") or {}).get("chat_template")
        chat = inside if isinstance(inside, str) else ""
    if modules is None and all(re.search(rf"['\"]{role}['\"]", chat) for role in ("query", "document")):
        head: tuple[str | int, ...] = ("Yes",)
        known = _published(path, files, stored, names)
        if known is not None:
            head = TEMPLATES[known[0]].head_tokens
        elif architecture == "causal language model":
            raise ValueError(
                f"{path} has a chat template with the roles query and document, but nothing says which token's logit "
                "is the score (1_LogitScore/config.json of sentence-transformers does). Name the template by template= "
                f"or --template: a JSON file with head_tokens, or one of {', '.join(TEMPLATES)}."
            )
        made = template_from_chat(files.tokenizer(trust_remote_code), head)
        return Found(made, "chat_template.jinja")
    known = _published(path, files, stored, names)
    if known is not None:
        return Found(TEMPLATES[known[0]], known[1], known[0])
    if architecture == "sequence classification":
        raise ValueError(
            f"{path} holds a {stored['architectures'][0]}, and nothing says which words it was trained with: neither a "
            "chat_template.jinja with the roles query and document, nor files of sentence-transformers, nor a known "
            f"name in its path, configuration or model card. Name its template by template= or --template: a JSON file "
            f"or one of {', '.join(TEMPLATES)}."
        )
    return Found(Template(), ASSUMED, "cost_wise")


def _published(path: str, files: Files, stored: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str] | None:
    """The template of a published re-ranker, and the name that says so."""
    backbone = str(stored.get("model_type"))
    sources = [("_name_or_path in config.json", str(stored.get("_name_or_path") or ""))]
    for name in (path, *names):
        # Of a path the last part says most; a backslash parts folders, too.
        sources += [("the name", part) for part in reversed(re.split(r"[/\\]", name)) if part]
    sources += [("base_model of README.md", name) for name in _base_models(files.text("README.md") or "")]
    for source, name in sources:
        plain = name.lower().replace("_", "-")
        for known in PUBLISHED:
            if known.name in plain and backbone in known.backbones:
                return known.template, f"{source}: {name}"
    return None


def _base_models(card: str) -> list[str]:
    """The `base_model` of a model card's metadata."""
    metadata = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    if metadata is None:
        return []
    found = re.search(r"^base_model:((?:[ \t]*\S[^\n]*)|(?:\n[ \t]*-[^\n]*)+)", metadata[1], re.MULTILINE)
    return [] if found is None else re.findall(r"[\w./-]*\w[\w./-]*", found[1])


def _modules(files: Files) -> list[Mapping[str, Any]] | None:
    """The modules of sentence-transformers; None if the checkpoint is none of theirs.

    Raises:
        ValueError: if the file holds no list of modules.
    """
    found = files.json(MODULES_FILE)
    if found is not None and (not isinstance(found, list) or not all(isinstance(one, dict) for one in found)):
        raise ValueError(f"{MODULES_FILE} of {files.place} must be a list of modules, got {found!r:.200}")
    return found


def _is_ours(modules: Sequence[Mapping[str, Any]] | None) -> bool:
    return bool(modules) and str(modules[0].get("type")).startswith(OURS)  # type: ignore[index]


def _of_sentence_transformers(
    files: Files, modules: Sequence[Mapping[str, Any]], trust_remote_code: bool, architecture: Architecture
) -> Found:
    """The template of a CrossEncoder.

    Raises:
        ValueError: if it has modules that are not a transformer and its score, or a template that cannot be cut.
    """
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    wanted = ["Transformer"] if architecture == "sequence classification" else ["Transformer", "LogitScore"]
    if kinds != wanted:
        raise ValueError(
            f"{MODULES_FILE} of {files.place} has the modules {kinds}; of a {architecture} {wanted} are loaded: a "
            "score is read at the last token, without pooling or further layers. With a template of the caller's, by "
            "template= or --template, it is taken as a raw language model."
        )
    head_tokens: tuple[str | int, ...] = ("Yes",)
    head_source = None
    if len(modules) == 2:
        head_source = f"{modules[1].get('path') or '.'}/config.json"
        score = files.json(head_source) or {}
        ids = [score.get(name) for name in ("true_token_id", "false_token_id")]
        if type(ids[0]) is not int:
            raise ValueError(f"{head_source} of {files.place} names no true_token_id: {score}")
        head_tokens = tuple(one for one in ids if one is not None)
    transformer = _transformer_settings(files, modules[0])
    options = dict((transformer.get("processing_kwargs") or {}).get("chat_template") or {})
    for name in ("restore_suffix", "padding", "truncation", "max_length", "return_tensors"):
        options.pop(name, None)
    tokenizer = files.tokenizer(trust_remote_code)
    modality = transformer.get("modality_config") or {}
    speaks = "message" in modality if modality else tokenizer.chat_template is not None
    if speaks and tokenizer.chat_template is None:
        raise ValueError(f"{files.place} takes messages (modality_config), but its tokenizer has no chat template.")
    if speaks:
        format_of = (modality.get("message") or {}).get("format", "flat")
        made = template_from_chat(tokenizer, head_tokens, options, is_structured=format_of == "structured")
        source = "chat_template.jinja"
    else:
        made, source = template_of_pairs(tokenizer, head_tokens), "the tokenizer's pairs"
    return Found(made, source, None, _default_prompt(files, made), head_source)


def _transformer_settings(files: Files, module: Mapping[str, Any]) -> Mapping[str, Any]:
    """`sentence_bert_config.json`, in the module's folder."""
    folder = module.get("path") or ""
    name = f"{folder}/sentence_bert_config.json" if folder else "sentence_bert_config.json"
    return files.json(name) or {}


def _default_prompt(files: Files, template: Template) -> Fact[str] | None:
    """The instruction of calls that give none: the default prompt of sentence-transformers.

    Raises:
        ValueError: if the template has no place for it.
    """
    name = "config_sentence_transformers.json"
    saved = files.json(name) or {}
    default = saved.get("default_prompt_name")
    text = (saved.get("prompts") or {}).get(default) if default is not None else None
    if text is None:
        return None
    if text and template.instructed is None:
        raise ValueError(
            f"{name} of {files.place} has the default prompt {text!r:.80}, but the template has no place for it."
        )
    return Fact(text, f"prompt {default!r} in {name}")


def _saved_instruction(
    files: Files, modules: Sequence[Mapping[str, Any]] | None, config: CostWiseConfig
) -> Fact[str] | None:
    """The default prompt of a CrossEncoder of ours."""
    return _default_prompt(files, Template.load(config.template)) if _is_ours(modules) else None


def _activation(files: Files, stored: Mapping[str, Any], modules: Sequence[Mapping[str, Any]] | None) -> Fact[str]:
    """What CrossEncoder applies to the raw score, by the files that it reads."""
    if modules is None:
        return Fact("identity", "none of sentence-transformers' files")
    name = "config_sentence_transformers.json"
    candidates = (
        ((files.json(name) or {}).get("activation_fn"), name),
        ((stored.get("sentence_transformers") or {}).get("activation_fn"), "sentence_transformers in config.json"),
        (stored.get("sbert_ce_default_activation_function"), "sbert_ce_default_activation_function in config.json"),
    )
    for path, source in candidates:
        if path is not None:
            if not str(path).startswith("torch."):
                return Fact("sigmoid", f"default: {path!r} in {source} is remote code, which does not run")
            plain = str(path).rpartition(".")[2].lower()
            return Fact(plain if plain in ("identity", "sigmoid") else str(path), source)
    return Fact("sigmoid", "default of sentence-transformers")
