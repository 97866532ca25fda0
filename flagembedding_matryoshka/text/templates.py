"""What stands around a query and a passage: data, which is saved with a checkpoint.

before  query  between  passage  behind  prompt
|----- query part -----|         |- prompt part -|

Each of the six is tokenised by itself. `before`, `between`, `behind` and `prompt` may hold control tokens; what a user
writes never becomes one.
"""

from __future__ import annotations

import json
import os.path
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

FLAT = "{}{}"
"""FlagEmbedding's format of an instruction and a text where nothing else is said."""


@dataclass(frozen=True)
class Template:
    """The words of one kind of re-ranker.

    Attributes:
        before, between, behind: in front of the query, between query and passage, behind the passage.
        query_instruction, passage_instruction: "" is none.
        query_format, passage_format: how instruction and text are put together, as in FlagEmbedding, with {} for each.
        prompt: what the score is read behind.
        head_tokens: the word whose logit is the score, or two, whose logits' difference it is.

    Raises:
        TypeError: if a value is not text.
        ValueError: if a format has not two {}, or there are not one or two words.
    """

    before: str = ""
    query_instruction: str = "A: "
    query_format: str = FLAT
    between: str = "\n"
    passage_instruction: str = "B: "
    passage_format: str = FLAT
    behind: str = "\n"
    prompt: str = "Predict whether passage B contains an answer to query A."
    head_tokens: tuple[str, ...] = ("Yes",)

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "head_tokens"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a template's {name} must be text, got {getattr(self, name)!r}.")
        for name in ("query_format", "passage_format"):
            # FlagEmbedding's formats come from command lines, where a line break is spelt with two characters.
            object.__setattr__(self, name, getattr(self, name).replace("\\n", "\n"))
            if _fields(getattr(self, name)) != ["", ""]:
                raise ValueError(
                    f"a template's {name} must have a {{}} for the instruction and one for the text, got "
                    f"{getattr(self, name)!r}."
                )
        words = self.head_tokens
        is_list = isinstance(words, list | tuple) and len(words) in (1, 2)
        if not is_list or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"a template's head_tokens must be one word or two in a list, got {words!r}.")
        object.__setattr__(self, "head_tokens", tuple(words))

    def replaced(self, **given: str | None) -> Template:
        """With other words where they are given: None is not, nor is a format that is FlagEmbedding's default."""
        is_default = {"query_format": FLAT, "passage_format": FLAT}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **{name: value for name, value in chosen.items() if value != is_default.get(name)})

    def query(self, text: str) -> str:
        """`text` with its instruction."""
        return self.query_format.format(self.query_instruction, text)

    def passage(self, text: str) -> str:
        """`text` with its instruction."""
        return self.passage_format.format(self.passage_instruction, text)

    @property
    def query_end(self) -> str:
        """What `query_format` puts behind the text, and no truncation takes away."""
        return _end(self.query_format)

    @property
    def passage_end(self) -> str:
        """What `passage_format` puts behind the text, and no truncation takes away."""
        return _end(self.passage_format)

    def to_json(self) -> dict[str, Any]:
        """As `Template.load` reads it."""
        return asdict(self) | {"head_tokens": list(self.head_tokens)}

    @classmethod
    def load(cls, given: str | PathLike[str] | Mapping[str, Any] | Template) -> Template:
        """A template by name, from a JSON file that says what differs from "cost_wise", or from what such a file holds.

        Raises:
            FileNotFoundError: if there is neither a template nor a file of that name.
            TypeError: if a value has another type.
            ValueError: if a file is no JSON object, or it names something that a template does not have.
        """
        if isinstance(given, Template):
            return given
        if isinstance(given, Mapping):
            known = [field.name for field in fields(cls)]
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"a template has no {unknown}; it has {known}.")
            return cls(**given)
        if isinstance(given, str) and given in TEMPLATES:
            return TEMPLATES[given]
        if not isinstance(given, str | PathLike):
            raise TypeError(f"a template must be a name, a JSON file or what such a file holds, got {given!r}.")
        path = Path(os.path.expanduser(given))
        if not os.path.isfile(path):  # of whatever a path cannot be, too
            raise FileNotFoundError(
                f"there is no template {str(given)!r:.200}: name a JSON file or one of {list(TEMPLATES)}."
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the template {path} is no JSON: {error}") from error
        if not isinstance(stored, dict):
            raise ValueError(f"the template {path} must be a JSON object, got {type(stored).__name__}.")
        return cls.load(stored)


def _fields(pattern: str) -> list[str]:
    """What a format has between its braces, doubled ones excepted; of one that is none, nothing."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError:
        return []
    return [f"{name}{f'!{kind}' if kind else ''}{spec}" for _, name, spec, kind in parts if name is not None]


def _end(pattern: str) -> str:
    """What stands behind the last field of a format."""
    end = ""
    for literal, name, _, _ in string.Formatter().parse(pattern):
        end = end + literal if name is None else ""
    return end


TEMPLATES = {
    # FlagEmbedding's CostWise Mistral (Matroyshka-ReRanker)
    "cost_wise": Template(),
    # BAAI/bge-reranker-v2.5-gemma2-lightweight: the same words
    "gemma2-lightweight": Template(),
    # BAAI/bge-reranker-v2-minicpm-layerwise, FlagEmbedding's LayerWiseFlagLLMReranker
    "minicpm": Template(
        prompt="Given a query A and a passage B, determine whether the passage contains an answer to the query by "
        "providing a prediction of either 'Yes' or 'No'."
    ),
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
    ),
    "question-passage": Template(
        query_instruction="question: ", between=" ", passage_instruction="passage: ", behind="", prompt=""
    ),
}

PUBLISHED = {"Qwen3-Reranker": "qwen3-reranker"}
"""How the names of published checkpoints that do not store a template begin."""


def template_of(path: str) -> str:
    """The name of the template that a checkpoint was trained with, where it does not store one."""
    name = Path(path).name
    return next((template for begin, template in PUBLISHED.items() if name.startswith(begin)), "cost_wise")
