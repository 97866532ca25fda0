"""Templates: the words around a query and a passage, which are saved with a checkpoint.

before  query  between  passage  behind  prompt
|----- query part -----|         |- prompt part -|

With `passage_first` the passage comes before the query:

before  passage  between  query  behind  prompt
                |------ prompt part -----------|

`before`, `between`, `behind` and `prompt` may hold control tokens. The text of a user never becomes one.
"""

from __future__ import annotations

import json
import os.path
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

FLAT = "{}{}"
"""FlagEmbedding's default format of an instruction and a text."""
INSTRUCTION = "{instruction}"
Words = str | tuple[str, ...]
"""Words of a template. In a tuple, control tokens are control tokens in the first, third, … text, and text in the
second, fourth, …"""
Bos = Literal["reference", "tokenizer", "template"]
Text = Literal["query", "passage", "instruction"]
OF_AN_INSTRUCTION = ("before", "query_instruction", "query_format", "behind")
"""Fields that an instruction may change."""


@dataclass(frozen=True)
class Template:
    """The words of one kind of re-ranker.

    Attributes:
        before, between, behind: words before the first text, between the texts, and after the second text.
        query_instruction, passage_instruction: words that go with a text; "" is none.
        query_format, passage_format: format of instruction and text, as in FlagEmbedding: {} for the instruction and
            then {} for the text, or {0} and {1} in any order.
        prompt: the last words of the sequence; the score is read at its last token.
        head_tokens: the token whose logit is the score, or two tokens; the score is then the difference of their
            logits. A word stands for its first token, a number is a token id.
        instruction: instruction of a call that gives none; "" is none.
        instructed: fields of `OF_AN_INSTRUCTION` that have another value if there is an instruction, with
            "{instruction}" in its place. `before` and `behind` are then lists, see `Words`. None: the template has no
            place for an instruction.
        passage_first: whether the passage comes before the query.
        bos: rule for the begin-of-sequence token. "reference": a sequence begins with it, unless it is also the pad
            token, and each field is tokenised by itself (reference of CostWise Mistral). If the template begins with a
            control token, "reference" means "tokenizer". "tokenizer": a sequence begins with it if the tokenizer adds
            it to texts. "template": only the template's own words hold one.
        strip: texts from which surrounding white space is removed.
        temperature: raw scores are divided by it before the sigmoid.

    Raises:
        TypeError: if a value has another type.
        ValueError: if a format does not have two {}, there are not one or two head tokens, or a value is not allowed.
    """

    before: Words = ""
    query_instruction: str = "A: "
    query_format: str = FLAT
    between: str = "\n"
    passage_instruction: str = "B: "
    passage_format: str = FLAT
    behind: Words = "\n"
    prompt: str = "Predict whether passage B contains an answer to query A."
    head_tokens: tuple[str | int, ...] = ("Yes",)
    instruction: str = ""
    instructed: Mapping[str, Any] | None = field(default=None, hash=False)
    passage_first: bool = False
    bos: Bos = "reference"
    strip: tuple[Text, ...] = ()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("query_instruction", "between", "passage_instruction", "prompt", "instruction"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a template's {name} must be a string, got {getattr(self, name)!r}.")
        for name in ("before", "behind"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        for name in ("query_format", "passage_format"):
            object.__setattr__(self, name, _format(name, getattr(self, name)))
        object.__setattr__(self, "head_tokens", _head_tokens(self.head_tokens))
        object.__setattr__(self, "instructed", _instructed(self.instructed))
        if self.instruction and self.instructed is None:
            raise ValueError(f"a template without `instructed` has no place for its instruction {self.instruction!r}.")
        if not isinstance(self.passage_first, bool):
            raise TypeError(f"a template's passage_first must be true or false, got {self.passage_first!r}.")
        if self.bos not in get_args(Bos):
            raise ValueError(f"a template's bos must be one of {list(get_args(Bos))}, got {self.bos!r}.")
        if not isinstance(self.strip, list | tuple) or set(self.strip) - set(get_args(Text)):
            raise ValueError(f"a template's strip must be a list of {list(get_args(Text))}, got {self.strip!r}.")
        object.__setattr__(self, "strip", tuple(self.strip))
        is_number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not is_number or not 0 < self.temperature < float("inf"):
            raise ValueError(f"a template's temperature must be a number above 0, got {self.temperature!r}.")

    def replaced(self, **given: str | None) -> Template:
        """Replace fields. None, or FlagEmbedding's default of a format, keeps a field.

        FlagEmbedding's formats come from command lines, which write a line break as backslash and n.
        """
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for name in {"query_format", "passage_format"} & chosen.keys():
            if chosen[name] == FLAT:
                del chosen[name]
            elif isinstance(chosen[name], str):
                chosen[name] = chosen[name].replace("\\n", "\n")
        return replace(self, **chosen)

    def with_instruction(self, instruction: str | None) -> Template:
        """Return the template of a call with an instruction.

        Args:
            instruction: None is the template's own `instruction`; "" is none.

        Raises:
            TypeError: if the instruction is not a string.
            ValueError: if the template has no place for it.
        """
        text = self.instruction if instruction is None else instruction
        if not isinstance(text, str):
            raise TypeError(f"an instruction must be a string, got {text!r:.80}.")
        text = text.strip() if "instruction" in self.strip else text
        if not text:
            return self
        if self.instructed is None:
            takers = [name for name, template in TEMPLATES.items() if template.instructed is not None]
            name = next((f" {name!r}" for name, template in TEMPLATES.items() if template == self), "")
            raise ValueError(
                f"the model's template{name} has no place for the instruction {text!r:.80}. Templates that have one: "
                f"{', '.join(takers)}, and those of a chat template with the role system."
            )
        changed: dict[str, Any] = {name: _filled(value, text) for name, value in self.instructed.items()}
        return replace(self, **changed)

    def query(self, text: str) -> str:
        """Return a query with its instruction."""
        text = text.strip() if "query" in self.strip else text
        return self.query_format.format(self.query_instruction, text)

    def passage(self, text: str) -> str:
        """Return a passage with its instruction."""
        text = text.strip() if "passage" in self.strip else text
        return self.passage_format.format(self.passage_instruction, text)

    @property
    def default_instruction(self) -> str:
        """Instruction of a call that gives none, which may be the `query_instruction`; "" is none."""
        is_in_query = self.instructed is not None and self.instructed.get("query_instruction") == INSTRUCTION
        return self.instruction or (self.query_instruction if is_in_query else "")

    @property
    def words(self) -> str:
        """The whole text of a call without an instruction, with {query} and {passage} in place of the texts."""
        own = self.with_instruction(None)
        before, behind = (part if isinstance(part, str) else "".join(part) for part in (own.before, own.behind))
        texts = [own.query("{query}"), own.between, own.passage("{passage}")]
        return "".join([before, *(texts[::-1] if own.passage_first else texts), behind, own.prompt])

    @cached_property
    def query_end(self) -> str:
        """The words of `query_format` after the query, which truncation keeps."""
        return _end(self.query_format, self.query_instruction)

    @cached_property
    def passage_end(self) -> str:
        """The words of `passage_format` after the passage, which truncation keeps."""
        return _end(self.passage_format, self.passage_instruction)

    @cached_property
    def has_reference_lengths(self) -> bool:
        """Whether lengths count as in the reference, whose sequences are [bos] query sep passage sep prompt. With other
        templates, lengths in training count only the user's texts."""
        is_flat = (self.before, self.between, self.behind, self.query_format, self.passage_format)
        return is_flat == ("", "\n", "\n", FLAT, FLAT) and not self.passage_first and self.bos == "reference"

    @cached_property
    def is_continuous(self) -> bool:
        """Whether query and passage are tokenised as a continuation of the words before them. The reference tokenises
        each by itself."""
        return self.bos != "reference"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `Template.load` reads them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def load(cls, given: str | PathLike[str] | Mapping[str, Any] | Template) -> Template:
        """Load a template.

        Args:
            given: a name; a JSON file with the fields that differ from "cost_wise"; or such fields.

        Raises:
            FileNotFoundError: if there is neither a template nor a file with the name.
            TypeError: if a value has another type.
            ValueError: if a file is not a JSON object, or has a field that templates do not have.
        """
        if isinstance(given, Template):
            return given
        if isinstance(given, Mapping):
            known = [field.name for field in fields(cls)]
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"a template has no fields {unknown}: allowed are {known}.")
            return cls(**given)
        if isinstance(given, str) and given in TEMPLATES:
            return TEMPLATES[given]
        if not isinstance(given, str | PathLike):
            raise TypeError(f"a template must be a name, a JSON file or an object of fields, got {given!r}.")
        path = Path(os.path.expanduser(given))
        if not os.path.isfile(path):  # False also for a string that cannot be a path
            raise FileNotFoundError(
                f"there is no template {str(given)!r:.200}: name a JSON file or one of {list(TEMPLATES)}."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the template {path} is not JSON: {error}") from error
        if not isinstance(stored, dict):
            raise ValueError(f"the template {path} must be a JSON object, got {type(stored).__name__}.")
        return cls.load(stored)


def _words(name: str, value: Any) -> Words:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise TypeError(f"a template's {name} must be a string, or a list of strings, got {value!r}.")


def _format(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a template's {name} must be a string, got {value!r}.")
    if _fields(value) not in (["", ""], ["0", "1"], ["1", "0"]):
        raise ValueError(
            f"a template's {name} must have a {{}} for the instruction and one for the text, got {value!r}."
        )
    return value


def _head_tokens(given: Any) -> tuple[str | int, ...]:
    is_list = isinstance(given, list | tuple) and len(given) in (1, 2)
    if not is_list or not all(
        (isinstance(token, str) and token) or (type(token) is int and token >= 0) for token in given
    ):
        raise ValueError(f"a template's head_tokens must be one word or two, or token ids, in a list, got {given!r}.")
    return tuple(given)


def _instructed(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise TypeError(f"a template's instructed must be an object of fields, got {given!r}.")
    if unknown := [name for name in given if name not in OF_AN_INSTRUCTION]:
        raise ValueError(f"a template's instructed may hold {list(OF_AN_INSTRUCTION)}, got {unknown}.")
    found: dict[str, Any] = {}
    places = 0
    for name, value in given.items():
        if name in ("before", "behind"):
            found[name] = _words(name, value)
            parts = (found[name],) if isinstance(found[name], str) else found[name]
            if any(INSTRUCTION in part for part in parts[::2]):
                raise ValueError(
                    f"a template's instructed {name} must be a list with {INSTRUCTION} in its second, fourth, … text, "
                    f"got {value!r}: in the other texts an instruction could spell control tokens."
                )
            places += sum(part.count(INSTRUCTION) for part in parts)
        elif name == "query_format":
            found[name] = _format(name, value)
        elif isinstance(value, str):
            found[name] = value
            places += value.count(INSTRUCTION)
        else:
            raise TypeError(f"a template's instructed {name} must be a string, got {value!r}.")
    if places != 1:
        raise ValueError(f"a template's instructed must hold {INSTRUCTION} once, got {dict(given)!r}.")
    return found


def _filled(value: Words, instruction: str) -> Words:
    """Return a field of `instructed` with the instruction in its place."""
    if isinstance(value, str):
        return value.replace(INSTRUCTION, instruction)
    return tuple(part.replace(INSTRUCTION, instruction) for part in value)


def _fields(pattern: str) -> list[str]:
    """Return the names in the braces of a format; empty if it is not a format."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError:
        return []
    return [f"{name}{f'!{kind}' if kind else ''}{spec}" for _, name, spec, kind in parts if name is not None]


def _end(pattern: str, instruction: str) -> str:
    """Return the words of a format after the text, the instruction among them if it follows the text."""
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(pattern)]
    names = [name for _, name in parts if name is not None]
    last = names.index("1") if "1" in names else 1
    end, seen = "", -1
    for literal, name in parts:
        if seen >= last:
            end += literal
        if name is not None:
            end += instruction if seen >= last else ""
            seen += 1
    return end


def of_head(words: Sequence[str | int]) -> str:
    """Return head tokens as errors and pages show them."""
    return " − ".join(f"id {word}" if isinstance(word, int) else repr(word) for word in words)


QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
MINICPM_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)

TEMPLATES = {
    # FlagEmbedding's CostWise Mistral (Matroyshka-ReRanker)
    "cost_wise": Template(),
    # BAAI/bge-reranker-v2.5-gemma2-lightweight: the same words
    "gemma2-lightweight": Template(),
    # BAAI/bge-reranker-v2-minicpm-layerwise, FlagEmbedding's LayerWiseFlagLLMReranker
    "minicpm": Template(prompt=MINICPM_PROMPT),
    # BAAI/bge-reranker-v2-gemma, FlagEmbedding's FlagLLMReranker
    "bge-gemma": Template(prompt=MINICPM_PROMPT),
    # Qwen/Qwen3-Reranker-0.6B, -4B and -8B, by the usage in their model cards
    "qwen3-reranker": Template(
        before="<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the "
        'Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        query_instruction="Given a web search query, retrieve relevant passages that answer the query",
        query_format="<Instruct>: {}\n<Query>: {}\n<Document>:",
        between="",
        passage_instruction="",
        passage_format="{} {}",
        behind="",
        prompt="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        head_tokens=("yes", "no"),
        instructed={"query_instruction": INSTRUCTION},
        bos="tokenizer",
    ),
    # zeroentropy/zerank-1, -1-small and -2: the query is the system's message, the document the user's
    "zerank": Template(
        before="<|im_start|>",
        query_instruction="",
        query_format="system\n{}{}",
        between="<|im_end|>\n<|im_start|>",
        passage_instruction="",
        passage_format="user\n{}{}",
        behind="",
        prompt="<|im_end|>\n<|im_start|>assistant\n",
        head_tokens=("Yes",),
        instructed={
            "query_instruction": INSTRUCTION,
            "query_format": "system\n<query>{1}</query>\n<instruction>{0}</instruction>",
        },
        bos="tokenizer",
        strip=("query", "passage"),
        temperature=5.0,
    ),
    # mixedbread-ai/mxbai-rerank-base-v2 and -large-v2
    "mxbai-v2": Template(
        before=QWEN_SYSTEM + "<|im_start|>user\n",
        query_instruction="",
        query_format="{}query: {}\ndocument:",
        between="",
        passage_instruction="",
        passage_format="{} {}\nYou",
        behind=" are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:",
        prompt="<|im_end|>\n<|im_start|>assistant\n",
        head_tokens=("1", "0"),
        instructed={"query_instruction": f"instruction: {INSTRUCTION}\n"},
        bos="tokenizer",
    ),
    # ContextualAI/ctxl-rerank-v2-instruct-multilingual-1b, -2b and -6b
    "ctxl-v2": Template(
        before="Check whether a given document contains information helpful to answer the query.\n<Document>",
        passage_instruction="",
        passage_format="{} {}\n<Query>",
        between="",
        query_instruction="",
        query_format=" {1}{0} ??",
        behind="",
        prompt="",
        head_tokens=(0,),
        instructed={"query_instruction": f" {INSTRUCTION}"},
        passage_first=True,
        bos="tokenizer",
    ),
    "question-passage": Template(
        query_instruction="question: ",
        between="",
        passage_instruction="passage: ",
        passage_format=" {}{}",
        behind="",
        prompt="",
    ),
}
