"""Facts about a checkpoint with their sources, read from its files without its weights.

A model is scored as it was trained. Template, instruction and head tokens come from the first of these sources that has
them:

1. the caller
2. the checkpoint's own configuration
3. the files of sentence-transformers
4. the chat template
5. the names of published re-rankers in the configuration, the path and the model card

If no source has them, a raw language model gets the template "cost_wise" with a warning, and a re-ranker is refused.
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

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flagembedding_matryoshka.checkpoints.chat_templates import template_from_chat, template_of_pairs
from flagembedding_matryoshka.models.configuration import CostWiseConfig
from flagembedding_matryoshka.private import find_file
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import TEMPLATES, Template, of_head

T = TypeVar("T")
Architecture = Literal["layer-wise", "sequence classification", "causal language model"]
CLASSIFIER = "ForSequenceClassification"
ASSUMED = "assumed"
MODULES_FILE = "modules.json"
MODULE_SETTINGS_FILE = "matryoshka_config.json"
EXPORT_FILE = "matryoshka_export.json"
"""File with source, calibration and temperature of an exit that was exported as a sequence classifier."""
MAX_LENGTH = 512
"""Tokens of query and passage, for checkpoints without a length."""
OF_A_MODULE = ("query_instruction", "passage_instruction", "prompt")
"""Fields of a template that `MatryoshkaModule` saves in `MODULE_SETTINGS_FILE`."""
OURS = "flagembedding_matryoshka."


class PublishedModel(NamedTuple):
    """A family of published re-rankers.

    Attributes:
        name: part of the names of their checkpoints, in lower case.
        template: name of their template.
        backbones: their model types.
    """

    name: str
    template: str
    backbones: tuple[str, ...]


PUBLISHED = (
    PublishedModel("matroyshka-reranker", "cost_wise", ("mistral",)),
    PublishedModel("qwen3-reranker", "qwen3-reranker", ("qwen3",)),
    PublishedModel("zerank", "zerank", ("qwen3",)),
    PublishedModel("mxbai-rerank-base-v2", "mxbai-v2", ("qwen2",)),
    PublishedModel("mxbai-rerank-large-v2", "mxbai-v2", ("qwen2",)),
    PublishedModel("ctxl-rerank-v2", "ctxl-v2", ("qwen3", "mistral")),
    PublishedModel("bge-reranker-v2-gemma", "bge-gemma", ("gemma",)),
    PublishedModel("bge-reranker-v2-minicpm-layerwise", "minicpm", ("minicpm",)),
    PublishedModel("bge-reranker-v2.5-gemma2-lightweight", "gemma2-lightweight", ("gemma2", "cost_wise_gemma")),
)


@dataclass(frozen=True)
class Fact(Generic[T]):
    """A value with its source, the file or name that it was read from."""

    value: T
    source: str


@dataclass(frozen=True)
class Description:
    """Facts about a checkpoint.

    Attributes:
        path: the checkpoint, as the caller names it.
        backbone: model type of the decoder.
        architecture: "layer-wise" (this package's or FlagEmbedding's), "sequence classification" or "causal language
            model".
        exits: layers at which scores can be read.
        heads: origin of the scoring heads.
        causality: "causal"; other models are refused.
        template: words around query and passage, with the default instruction.
        template_name: name of a known template; None for other templates.
        instruction: the default instruction, with a source of its own.
        head_tokens: tokens whose logits give the score, for a model whose heads are not stored.
        activation: function that the checkpoint applies to raw scores: "identity", "sigmoid" or a dotted path.
        dtype: dtype of the stored weights.
        quantization: quantization method of the stored weights; None if they are not quantized.
        max_length, query_max_length: lengths that the checkpoint was saved with; None if it has none.
        obstacle: reason why the checkpoint can be fine-tuned but not scored; None if it can be scored.
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
    obstacle: str | None = None

    @property
    def is_assumed(self) -> bool:
        """Whether no source has the template of the model's training."""
        return self.template.source == ASSUMED

    @property
    def assumption(self) -> str:
        """The warning about an assumed template."""
        return (
            f"nothing in {self.path} says which template the model was trained with: 'cost_wise' is assumed, whose "
            f"scores mean nothing before fine-tuning. Name another by template= or --template: a JSON file or one of "
            f"{', '.join(TEMPLATES)}."
        )

    @property
    def summary(self) -> str:
        """The facts in one line, for a log."""
        name = self.template_name.value or "of its own"
        return (
            f"{self.path}: {self.backbone.value}, {self.architecture.value}, exits {list(self.exits.value)}, template "
            f"{name} [{self.template.source}], instruction {self.instruction.value!r} [{self.instruction.source}]"
        )

    def check_scoring(self) -> None:
        """Warn if the template is assumed.

        Raises:
            ValueError: if the checkpoint must be fine-tuned before it can be scored.
        """
        if self.obstacle is not None:
            raise ValueError(self.obstacle)
        if self.is_assumed:
            warnings.warn(self.assumption, UserWarning, stacklevel=3)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and source of each fact, as text."""
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
        """Return {fact: {"value", "source"}} in JSON values."""
        found: dict[str, dict[str, Any]] = {}
        for field in fields(self):
            fact = getattr(self, field.name)
            if isinstance(fact, Fact):
                value = fact.value.to_json() if isinstance(fact.value, Template) else fact.value
                found[field.name] = {"value": value, "source": fact.source}
        return found


class Files:
    """The small files of a checkpoint.

    Args:
        place: a directory, or a name on the hub.
        hub: `cache_dir`, `token`, … as in transformers.
    """

    def __init__(self, place: str, hub: Mapping[str, Any]) -> None:
        self.place = place
        self._hub = dict(hub)

    def path(self, name: str) -> Path | None:
        """Return the path of a file; None if the checkpoint has no file of this name."""
        found = find_file(self.place, name, **self._hub)
        return None if found is None else Path(found)

    def text(self, name: str) -> str | None:
        """Return the content of a file; None if the checkpoint has no file of this name."""
        path = self.path(name)
        return None if path is None else path.read_text(encoding="utf-8", errors="replace")

    def json(self, name: str) -> Any:
        """Return the value of a JSON file; None if the checkpoint has no file of this name.

        Raises:
            ValueError: if the file is not JSON.
        """
        text = self.text(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise ValueError(f"{name} of {self.place} is no JSON: {error}") from error

    def tokenizer(self, trust_remote_code: bool) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the checkpoint."""
        return AutoTokenizer.from_pretrained(self.place, trust_remote_code=trust_remote_code, **self._hub)


class TemplateFact(NamedTuple):
    """A template with its source.

    Attributes:
        name: name of a known template; None for other templates.
        instruction: default instruction; None is the template's, from the same source.
        head_source: source of the head tokens; None is the source of the template.
        max_length: tokens of query and passage that texts were truncated to; None if the source has no length.
    """

    template: Template
    source: str
    name: str | None = None
    instruction: Fact[str] | None = None
    head_source: str | None = None
    max_length: Fact[int | None] | None = None


def is_classifier(stored: Mapping[str, Any]) -> bool:
    """Return whether a stored configuration is that of a sequence classifier of transformers.

    A layer-wise configuration is not, although fine-tuning keeps the architecture of the base in it.
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
        path: the checkpoint, as the caller names it.
        files: the files of the checkpoint.
        stored: its config.json, or the config.json of its base.
        config: configuration of the model that will be loaded, with its exits.
        architecture: see `Description`.
        template: template that the caller gives; None is the checkpoint's own.
        names: further names of the checkpoint, such as the name of its base.
        trust_remote_code: as in transformers, for the tokenizer only.

    Raises:
        ValueError: if the checkpoint is a re-ranker whose template is unknown, or its files are not those of a
            re-ranker.
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
    pad = stored.get("pad_token_id")
    if architecture == "sequence classification" and type(pad) is int:
        words = _read_before_padding(path, words, files.tokenizer(trust_remote_code), pad)
    obstacle = None
    is_capped = getattr(config, "final_logit_softcapping", None) is not None
    if architecture == "causal language model" and is_capped and len(words.head_tokens) == 2:
        obstacle = (
            f"{path} caps its logits (final_logit_softcapping in config.json), and its score is the difference of two: "
            f"{of_head(words.head_tokens)}. A head here is one linear map, which cannot cap each of them. Fine-tune it "
            "first, or name a template with one head token."
        )
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
        max_length=found.max_length or Fact(module_settings.get("max_length"), MODULE_SETTINGS_FILE),
        query_max_length=Fact(module_settings.get("query_max_length"), MODULE_SETTINGS_FILE),
        obstacle=obstacle,
    )


def _read_before_padding(path: str, template: Template, tokenizer: PreTrainedTokenizerBase, pad: int) -> Template:
    """Return a template without pad tokens at its end.

    A classifier of transformers reads the score at the last token that is not the pad token.

    Raises:
        ValueError: if sequences still end with the pad token.
    """
    token = str(tokenizer.convert_ids_to_tokens(pad))
    fields: dict[str, Any] = template.to_json()
    while fields["prompt"].endswith(token):
        fields["prompt"] = fields["prompt"].removesuffix(token)
    if not fields["prompt"]:
        while isinstance(fields["behind"], str) and fields["behind"].endswith(token):
            fields["behind"] = fields["behind"].removesuffix(token)
    found = Template.load(fields)
    (pair,) = PairTokenizer(tokenizer, found.with_instruction(None)).build([("a", "a")], 99, 99, 10**6)
    changes_end = found.instructed is not None and "behind" in found.instructed and not found.prompt
    if pair.input_ids[-1] == pad or changes_end:
        raise ValueError(
            f"{path} holds a sequence classifier, which is read at the last token that is not the pad token {token!r}, "
            f"but its template ends with it: {template.words!r:.200}. Name a template without it by template= or "
            "--template."
        )
    return found


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
) -> TemplateFact:
    """Return the template from the first source that has it."""
    if given is not None:
        name = given if isinstance(given, str) and given in TEMPLATES else None
        return TemplateFact(Template.load(given), "the caller", name)
    if architecture == "layer-wise":
        name = config.template if isinstance(config.template, str) else None
        source = "template in config.json" if "template" in stored else f"model_type {stored.get('model_type')!r}"
        return TemplateFact(Template.load(config.template), source, name, _saved_instruction(files, modules, config))
    known = _published(path, files, stored, names)
    temperature = {} if known is None else {"temperature": TEMPLATES[known[0]].temperature}
    if (exported := files.json(EXPORT_FILE)) is not None:  # the exported head may be divided by it
        temperature = {"temperature": exported["temperature"]}
    if modules is not None and not _is_ours(modules):
        found = _of_sentence_transformers(files, stored, modules, trust_remote_code, architecture)
        return found._replace(template=Template.load(found.template.to_json() | temperature))
    chat = files.text("chat_template.jinja") or ""
    if not chat:
        inside = (files.json("tokenizer_config.json") or {}).get("chat_template")
        if isinstance(inside, list):  # of several, apply_chat_template takes the one of this name
            inside = next((one.get("template") for one in inside if one.get("name") == "default"), None)
        chat = inside if isinstance(inside, str) else ""
    if modules is None and all(re.search(rf"['\"]{role}['\"]", chat) for role in ("query", "document")):
        head: tuple[str | int, ...] = ("Yes",)
        if known is not None:
            head = TEMPLATES[known[0]].head_tokens
        elif architecture == "causal language model":
            raise ValueError(
                f"{path} has a chat template with the roles query and document, but nothing says which token's logit "
                "is the score (1_LogitScore/config.json of sentence-transformers does). Name the template by template= "
                f"or --template: a JSON file with head_tokens, or one of {', '.join(TEMPLATES)}."
            )
        made = template_from_chat(files.tokenizer(trust_remote_code), head)
        return TemplateFact(Template.load(made.to_json() | temperature), "chat_template.jinja")
    if known is not None:
        return TemplateFact(TEMPLATES[known[0]], known[1], known[0])
    if architecture == "sequence classification":
        raise ValueError(
            f"{path} holds a {stored['architectures'][0]}, and nothing says which words it was trained with: neither a "
            "chat_template.jinja with the roles query and document, nor files of sentence-transformers, nor a known "
            f"name in its path, configuration or model card. Name its template by template= or --template: a JSON file "
            f"or one of {', '.join(TEMPLATES)}."
        )
    return TemplateFact(Template(), ASSUMED, "cost_wise")


def _published(path: str, files: Files, stored: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str] | None:
    """Return the name of a published re-ranker's template, and its source; None for other checkpoints."""
    backbone = str(stored.get("model_type"))
    sources = [("_name_or_path in config.json", str(stored.get("_name_or_path") or ""))]
    for name in (path, *names):
        # The last folder first. A backslash separates folders, too.
        sources += [("the name", part) for part in reversed(re.split(r"[/\\]", name)) if part]
    sources += [("base_model of README.md", name) for name in _base_models(files.text("README.md") or "")]
    for source, name in sources:
        plain = name.lower().replace("_", "-")
        for known in PUBLISHED:
            if known.name in plain and backbone in known.backbones:
                return known.template, f"{source}: {name}"
    return None


def _base_models(card: str) -> list[str]:
    """Return the `base_model` of a model card's metadata."""
    metadata = re.match(r"\ufeff?---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        fields_of_card = yaml.safe_load(metadata[1]) if metadata else None
    except yaml.YAMLError:  # cards are written by people, so faults in them are no errors
        return []
    found = fields_of_card.get("base_model") if isinstance(fields_of_card, dict) else None
    return [name.strip() for name in ([found] if isinstance(found, str) else found or ()) if isinstance(name, str)]


def _modules(files: Files) -> list[Mapping[str, Any]] | None:
    """Return the modules in `modules.json` of sentence-transformers; None without this file.

    Raises:
        ValueError: if the file is not a list of modules.
    """
    found = files.json(MODULES_FILE)
    if found is not None and (not isinstance(found, list) or not all(isinstance(one, dict) for one in found)):
        raise ValueError(f"{MODULES_FILE} of {files.place} must be a list of modules, got {found!r:.200}")
    return found


def _is_ours(modules: Sequence[Mapping[str, Any]] | None) -> bool:
    return bool(modules) and str(modules[0].get("type")).startswith(OURS)  # type: ignore[index]


def _of_sentence_transformers(
    files: Files,
    stored: Mapping[str, Any],
    modules: Sequence[Mapping[str, Any]],
    trust_remote_code: bool,
    architecture: Architecture,
) -> TemplateFact:
    """Return the template of a CrossEncoder.

    Raises:
        ValueError: if it has other modules than a transformer and its score, or a template whose words around the texts
            cannot be determined.
    """
    types = [str(module.get("type")) for module in modules]
    kinds = [kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else kind for kind in types]
    wanted = ["Transformer"] if architecture == "sequence classification" else ["Transformer", "LogitScore"]
    if kinds != wanted:
        raise ValueError(
            f"{MODULES_FILE} of {files.place} has the modules {kinds}; of a {architecture} {wanted} of "
            "sentence-transformers are loaded: no remote code runs, and a score is read at the last token, without "
            "pooling or further layers. With a template of the caller's, by template= or --template, the checkpoint is "
            "taken as a raw language model."
        )
    head_tokens: tuple[str | int, ...] = ("Yes",)
    head_source = None
    if len(modules) == 2:
        head_source = f"{modules[1].get('path') or '.'}/config.json"
        score = files.json(head_source) or {}
        ids = [score.get(name) for name in ("true_token_id", "false_token_id")]
        if type(ids[0]) is not int or not (ids[1] is None or type(ids[1]) is int):
            raise ValueError(
                f"{head_source} of {files.place} must hold a token id as true_token_id and an id or null as "
                f"false_token_id, got {score}"
            )
        head_tokens = tuple(one for one in ids if one is not None)
    transformer = _transformer_settings(files, modules[0])
    options = _chat_options(files, transformer)
    tokenizer = files.tokenizer(trust_remote_code)
    modality = transformer.get("modality_config") or {}  # without it sentence-transformers takes pairs
    speaks = "message" in modality
    if speaks and tokenizer.chat_template is None:
        raise ValueError(f"{files.place} takes messages (modality_config), but its tokenizer has no chat template.")
    if speaks:
        format_of = (modality.get("message") or {}).get("format", "flat")
        made = template_from_chat(tokenizer, head_tokens, options, is_structured=format_of == "structured")
        source = "chat_template.jinja"
    else:
        made, source = template_of_pairs(tokenizer, head_tokens), "the tokenizer's pairs"
    control_tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    instruction = _default_prompt(files, made, control_tokens)
    length = _saved_length(files, stored, modules)
    if length.value is not None:
        words = made.with_instruction(None if instruction is None else instruction.value)
        (empty,) = PairTokenizer(tokenizer, words).build([("", "")], 10**6, 10**6, 3 * 10**6)
        length = Fact(max(1, length.value - len(empty)), f"{length.source}, without the template's {len(empty)}")
    return TemplateFact(made, source, None, instruction, head_source, length)


def _chat_options(files: Files, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of the chat template.

    Raises:
        ValueError: if sentence-transformers would change or truncate texts in a way that this package does not have.
    """
    name = f"sentence_bert_config.json of {files.place}"
    if transformer.get("do_lower_case"):
        raise ValueError(f"{name} has do_lower_case={transformer['do_lower_case']!r}: texts are not lower-cased here.")
    processing = {key: value for key, value in (transformer.get("processing_kwargs") or {}).items() if value}
    options = dict(processing.pop("chat_template", {}))
    if options.pop("restore_suffix", True) is not True:
        processing["chat_template"] = {"restore_suffix": False}
    for key in ("padding", "return_tensors", "return_dict", "add_special_tokens"):
        options.pop(key, None)
    if unknown := {key: options[key] for key in ("truncation", "max_length", "tokenize") if key in options}:
        processing["chat_template"] = unknown
    if processing:
        raise ValueError(
            f"{name} has processing_kwargs {processing}, which change or cut texts in another way than here. Name the "
            "template by template= or --template, and the length by max_length, to load the checkpoint without them."
        )
    return options


def _saved_length(files: Files, stored: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> Fact[int | None]:
    """Return the maximum length of a saved CrossEncoder, in tokens of a sequence with the template's words."""
    saved = _transformer_settings(files, modules[0]).get("max_seq_length")
    if type(saved) is int:
        return Fact(saved, "max_seq_length in sentence_bert_config.json")
    length = (files.json("tokenizer_config.json") or {}).get("model_max_length")
    positions = stored.get("max_position_embeddings")
    if type(length) is int and type(positions) is int and length <= positions:
        return Fact(length, "model_max_length in tokenizer_config.json")
    return Fact(None, "default")


def _transformer_settings(files: Files, module: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the content of `sentence_bert_config.json` in a module's folder; {} without this file."""
    folder = module.get("path") or ""
    name = f"{folder}/sentence_bert_config.json" if folder else "sentence_bert_config.json"
    return files.json(name) or {}


def _default_prompt(files: Files, template: Template, control_tokens: Sequence[str] = ()) -> Fact[str] | None:
    """Return the default instruction, which is the default prompt of sentence-transformers; None if it has none.

    Args:
        control_tokens: control tokens of the tokenizer. sentence-transformers reads them in prompts as control tokens,
            and this package reads them in instructions as text.

    Raises:
        ValueError: if there is no prompt of the default's name, it is not a string, the template has no place for it,
            or it contains a control token.
    """
    name = "config_sentence_transformers.json"
    saved = files.json(name) or {}
    default, prompts = saved.get("default_prompt_name"), saved.get("prompts") or {}
    if default is None:
        return None
    if not isinstance(prompts.get(default), str):
        raise ValueError(
            f"{name} of {files.place} has default_prompt_name={default!r}, but prompts[{default!r}] is "
            f"{prompts.get(default)!r:.80}: it must be a text."
        )
    text = prompts[default]
    if found := [token for token in control_tokens if token in text]:
        raise ValueError(
            f"{name} of {files.place} has the default prompt {text!r:.80} with the control token {found[0]!r}, which "
            "is text in an instruction here. Put it into the template, by template= or --template."
        )
    if text and template.instructed is None:
        raise ValueError(
            f"{name} of {files.place} has the default prompt {text!r:.80}, but the template has no place for it."
        )
    return Fact(text, f"prompt {default!r} in {name}")


def _saved_instruction(
    files: Files, modules: Sequence[Mapping[str, Any]] | None, config: CostWiseConfig
) -> Fact[str] | None:
    """Return the default prompt of a CrossEncoder with this package's module; None for other checkpoints."""
    return _default_prompt(files, Template.load(config.template)) if _is_ours(modules) else None


def _activation(files: Files, stored: Mapping[str, Any], modules: Sequence[Mapping[str, Any]] | None) -> Fact[str]:
    """Return the function that CrossEncoder applies to raw scores, by the files that it reads."""
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
    if modules is None:
        return Fact("identity", "none of sentence-transformers' files")
    return Fact("sigmoid", "default of sentence-transformers")
