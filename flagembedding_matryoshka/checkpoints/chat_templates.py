"""Conversion of a checkpoint's chat template to a [`Template`][flagembedding_matryoshka.text.templates.Template].

sentence-transformers (5.4 and later) renders pairs with such a template, as messages with the roles system (the
instruction), query and document. Here the tokenizer renders characters of the private use area in place of the texts.
The words between these marks are cut at places where a new token begins, whatever the texts are. The fields can then be
tokenised separately and have the tokens of the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flagembedding_matryoshka.text.encoding import MARK
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import INSTRUCTION, Bos, Template

ROLES = {"instruction": "system", "query": "query", "passage": "document"}
MARKS = {"instruction": "\ue001", "query": "\ue002", "passage": "\ue003"}
PROBES = (
    *("a", "Wing?", " b", "x ", "\nc\n", "1, 2", "(d).", "中文", "é🙂", "", "a\n\nb. ", "'s it"),
    *("\tq", "  two", "end:\n", "“q”", "<tag>", "#5 -", "A.\r\n", "it’s", "\u00a0z"),
)
"""Texts whose first or last characters a tokenizer may join with the words beside them."""
NOT_LITERAL = "a'\"<b> & {{c}} {% d %} \\ 中\n\nE" + " f" * 50_000
"""A text that changes if a template escapes, truncates or changes the case of texts."""


def template_from_chat(
    tokenizer: PreTrainedTokenizerBase,
    head_tokens: Sequence[str | int],
    options: Mapping[str, Any] | None = None,
    is_structured: bool = False,
) -> Template:
    """Convert a tokenizer's chat template.

    Args:
        tokenizer: a tokenizer whose chat template takes the roles query and document.
        head_tokens: head tokens of the result.
        options: keyword arguments of `apply_chat_template`, such as add_generation_prompt.
        is_structured: True if a message's content is a list of objects with a text, False if it is the text.

    Raises:
        ValueError: if the chat template leaves out or changes a text, or cannot be cut, with the rendered text.
    """
    return _Cutter(tokenizer, dict(options or {}), is_structured).template(head_tokens)


def template_of_pairs(tokenizer: PreTrainedTokenizerBase, head_tokens: Sequence[str | int]) -> Template:
    """Return the template of a tokenizer without a chat template, which takes query and passage as a pair.

    An instruction is directly before the query.

    Raises:
        ValueError: if the tokenizer adds tokens between or after the texts.
    """
    rules: tuple[Bos, ...] = ("tokenizer", "reference")
    for bos in rules:
        template = Template(
            query_instruction="",
            between="",
            passage_instruction="",
            behind="",
            prompt="",
            head_tokens=tuple(head_tokens),
            instructed={"query_instruction": INSTRUCTION},
            bos=bos,
        )
        tokenize = PairTokenizer(tokenizer, template)
        pairs = list(_probes())
        built = tokenize.build(pairs, 10**6, 10**6, 3 * 10**6)
        if all(
            pair.input_ids.tolist() == tokenizer(query, passage)["input_ids"]
            for pair, (query, passage) in zip(built, pairs, strict=True)
        ):
            return template
    raise ValueError(
        "the tokenizer has no chat template, and makes "
        f"{tokenizer.decode(tokenizer('QUERY', 'PASSAGE')['input_ids'])!r} of the pair ('QUERY', 'PASSAGE'), which are "
        "not the words of a template. Name the template that the model was trained with, by template= or --template."
    )


@dataclass(frozen=True)
class _Layout:
    """The words of a rendered chat template, with the names of the texts between them.

    Attributes:
        words: the words before, between and after the texts, one item more than `names`.
        names: names of the texts, in their order.
    """

    words: tuple[str, ...]
    names: tuple[str, ...]

    def filled(self, texts: Mapping[str, str]) -> str:
        """Return the words with these texts between them."""
        parts = [self.words[0]]
        for name, words in zip(self.names, self.words[1:], strict=True):
            parts += [texts[name], words]
        return "".join(parts)

    def before(self, place: int, texts: Mapping[str, str]) -> int:
        """Return the number of characters before the words at `place`."""
        parts = zip(self.words[:place], self.names[:place], strict=True)
        return sum(len(words) + len(texts[name]) for words, name in parts)


class _Cutter:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], is_structured: bool) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.is_structured = is_structured
        self.control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        marked = tokenizer([f"{MARK}a b", MARK, "a b"], add_special_tokens=False)["input_ids"]
        self.mark_tokens = len(marked[1]) if marked[0][len(marked[1]) :] != marked[2] else 0

    def template(self, head_tokens: Sequence[str | int]) -> Template:
        strip = self._stripped()
        plain = self._fields(self._layout(("query", "passage"), strip))
        instructed = self._with_instruction(plain, strip)
        found = Template(
            **plain,
            query_instruction="",
            passage_instruction="",
            prompt="",
            head_tokens=tuple(head_tokens),
            instructed=instructed,
            bos="template",
            strip=tuple(name for name in strip if name != "instruction" or instructed is not None),
        )
        self._check(found)
        return found

    def _render(self, texts: Mapping[str, str]) -> str:
        def content(text: str) -> Any:
            return [{"type": "text", "text": text}] if self.is_structured else text

        messages = [{"role": role, "content": content(texts[name])} for name, role in ROLES.items() if name in texts]
        try:
            rendered: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template cannot be rendered with {messages}: {error}") from error
        return rendered

    def _stripped(self) -> list[Any]:
        """Return the names of texts whose surrounding white space the chat template removes."""
        found: list[Any] = []
        for name, mark in MARKS.items():
            given = {one: MARKS[one] for one in MARKS if one != "instruction"} | {name: f"\n {mark} "}
            text = self._render(given)
            if mark in text and given[name] not in text:
                if self._render(given | {name: mark}) != text:
                    raise ValueError(f"the chat template changes the white space around its {name}: {text!r}")
                found.append(name)
        return found

    def _layout(self, names: Sequence[str], strip: Sequence[str]) -> _Layout:
        """Render the chat template and split it at the texts.

        Raises:
            ValueError: if the chat template leaves out, repeats or changes a text.
        """
        marks = {name: MARKS[name] for name in names}
        text = self._render(marks)
        for name, mark in marks.items():
            if text.count(mark) != 1:
                what = "leaves out" if mark not in text else f"repeats {text.count(mark)} times"
                raise ValueError(
                    f"the chat template {what} the text of the role {ROLES[name]!r}, so it is not one of a re-ranker; "
                    f"it renders {text!r}. Name the template that the model was trained with, by template= or "
                    "--template."
                )
        parts = re.split(f"([{''.join(marks.values())}])", text)
        names_of = {mark: name for name, mark in marks.items()}
        layout = _Layout(tuple(parts[::2]), tuple(names_of[mark] for mark in parts[1::2]))
        for texts in ({name: NOT_LITERAL for name in names}, {name: f"{name} 1." for name in names}):
            if self._render(texts) != layout.filled(texts):
                raise ValueError(f"the chat template changes its texts; of {texts} it makes {self._render(texts)!r}")
        return layout

    def _fields(self, layout: _Layout) -> dict[str, Any]:
        """Return the fields of a template, with an instruction if the layout has one."""
        order = [name for name in layout.names if name != "instruction"]
        groups = self._groups(layout)
        first_begin = self._cut(layout, groups[0][0], from_end=True)
        first_end, second_begin = self._between(layout, groups[0][1])
        second_end = self._cut(layout, groups[1][1], from_end=False)
        formats = {}
        for name, (start, end), begin, stop in (
            (order[0], groups[0], first_begin, first_end),
            (order[1], groups[1], second_begin, second_end),
        ):
            formats[name] = self._format(layout, start, end, begin, stop)
        first, last = groups[0][0], groups[1][1]
        is_before, is_behind = first > 0, last + 1 < len(layout.words)
        return {
            "before": self._fixed(layout.words[first][:first_begin], layout.words[0] if is_before else None, False),
            "query_format": formats["query"],
            "between": layout.words[groups[0][1]][first_end:second_begin],
            "passage_format": formats["passage"],
            "behind": self._fixed(layout.words[last][second_end:], layout.words[-1] if is_behind else None, True),
            "passage_first": order[0] == "passage",
        }

    def _groups(self, layout: _Layout) -> list[tuple[int, int]]:
        """Return for both texts the places in `layout.words` of the words before and after them.

        An instruction is in one group with its query if there is no control token between them.

        Raises:
            ValueError: if the instruction is between query and document, and not in one group with the query.
        """
        places = {name: place for place, name in enumerate(layout.names)}
        groups = {name: (places[name], places[name] + 1) for name in ("query", "passage")}
        if "instruction" in places and abs(places["instruction"] - places["query"]) == 1:
            inner = max(places["instruction"], places["query"])
            if not any(token in layout.words[inner] for token in self.control):
                start = min(places["instruction"], places["query"])
                groups["query"] = (start, start + 2)
        found = sorted(groups.values())
        if found[0][1] != found[1][0]:
            raise ValueError(
                f"the chat template has its instruction apart between query and document: {layout.filled(MARKS)!r}"
            )
        return found

    def _fixed(self, own: str, outer: str | None, at_end: bool) -> str | list[str]:
        """Return the field `before` or `behind` of the template.

        Args:
            own: the words beside the text.
            outer: the words on the other side of an instruction beside `own`; None without such an instruction.
            at_end: whether the words are after the texts.
        """
        if outer is None:
            return own
        ahead, behind = (own, outer) if at_end else (outer, own)
        begins, stops = self._control_spans(ahead), self._control_spans(behind)
        begin = begins[-1][1] if begins else 0
        stop = stops[0][0] if stops else len(behind)
        return [ahead[:begin], f"{ahead[begin:]}{INSTRUCTION}{behind[:stop]}", behind[stop:]]

    def _format(self, layout: _Layout, start: int, end: int, begin: int, stop: int) -> str:
        """Return the format of a text, with the words around it and the instruction in its group."""
        names = layout.names[start:end]
        words = [layout.words[start][begin:], *layout.words[start + 1 : end], layout.words[end][:stop]]
        escaped = [part.replace("{", "{{").replace("}", "}}") for part in words]
        if len(names) == 1:
            return f"{escaped[0]}{{}}{{}}{escaped[1]}"
        slots = ["{0}" if name == "instruction" else "{1}" for name in names]
        return f"{escaped[0]}{slots[0]}{escaped[1]}{slots[1]}{escaped[2]}"

    def _between(self, layout: _Layout, place: int) -> tuple[int, int]:
        """Return two places at which to cut the words between the texts.

        The words before the first place go to the first text, and those after the second place to the second text.
        """
        words = layout.words[place]
        spans = self._control_spans(words)
        if spans:
            # A passage takes as few words as possible, because there are many passages. A query takes as many as
            # possible, so that the words between the texts are the same with and without an instruction.
            up_to_control = range(spans[0][0] + 1)
            is_query = layout.names[place - 1] != "passage"
            first = self._first_cut(layout, place, up_to_control[::-1] if is_query else up_to_control)
            second = self._first_cut(layout, place, range(len(words), spans[-1][1] - 1, -1))
            return first, second
        cut = self._first_cut(layout, place, range(len(words), -1, -1))
        return cut, cut

    def _cut(self, layout: _Layout, place: int, from_end: bool) -> int:
        """Return the place at which to cut the words at `place`, as near to their text as possible."""
        words = layout.words[place]
        spans = self._control_spans(words)
        if from_end:
            return self._first_cut(layout, place, range(len(words), spans[-1][1] - 1 if spans else -1, -1))
        return self._first_cut(layout, place, range(spans[0][0] + 1 if spans else len(words) + 1))

    def _control_spans(self, words: str) -> list[tuple[int, int]]:
        """Return (start, end) of each control token in words."""
        if not self.control:
            return []
        pattern = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True)))
        return [match.span() for match in re.finditer(pattern, words)]

    def _first_cut(self, layout: _Layout, place: int, candidates: range) -> int:
        """Return the first candidate at which a token ends, whatever the texts are.

        Raises:
            ValueError: if there is no such candidate.
        """
        for cut in candidates:
            if all(self._is_boundary(layout, place, cut, texts) for texts in _probes_of(layout.names)):
                return cut
        raise ValueError(
            f"the chat template cannot be cut: the tokenizer joins the words {layout.words[place]!r} with the texts "
            f"beside them, in {layout.filled(MARKS)!r}"
        )

    def _is_boundary(self, layout: _Layout, place: int, cut: int, texts: Mapping[str, str]) -> bool:
        whole = layout.filled(texts)
        position = layout.before(place, texts) + cut
        if self._ids(whole) != self._ids(whole[:position]) + self._ids(whole[position:], continues=position > 0):
            return False
        # A tokenizer that splits text into words before merges must split there, too: otherwise the boundary may be a
        # coincidence of its vocabulary.
        spans = self._control_spans(whole)
        start = max((end for _, end in spans if end <= position), default=0)
        stop = min((begin for begin, _ in spans if begin >= position), default=len(whole))
        first, second = whole[start:position], whole[position:stop]
        return self.mark_tokens > 0 or self._split(first + second) == self._split(first) + self._split(second)

    def _split(self, text: str) -> list[str]:
        """Return the words into which the tokenizer splits a text before merges; [] if it does not split texts."""
        backend = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else None
        if not text or backend is None or backend.pre_tokenizer is None:
            return []
        normalized = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]

    def _ids(self, text: str, continues: bool = False) -> list[int]:
        if not text:
            return []
        if continues and self.mark_tokens and not text.startswith(tuple(self.control)):
            return self.tokenizer(MARK + text, add_special_tokens=False)["input_ids"][self.mark_tokens :]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_instruction(self, plain: Mapping[str, Any], strip: Sequence[str]) -> dict[str, Any] | None:
        """Return the fields that an instruction changes; None if the chat template leaves it out."""
        names = ("instruction", "query", "passage")
        if MARKS["instruction"] not in self._render({name: MARKS[name] for name in names}):
            return None
        fields = self._fields(self._layout(names, strip))
        for name in ("between", "passage_format", "passage_first"):
            if fields[name] != plain[name]:
                raise ValueError(
                    f"the chat template changes the words around the document where it has an instruction: "
                    f"{plain[name]!r} and {fields[name]!r}"
                )
        changed = {name: fields[name] for name in ("before", "query_format", "behind") if fields[name] != plain[name]}
        if "{0}" in fields["query_format"]:
            changed["query_instruction"] = INSTRUCTION
        return changed

    def _check(self, template: Template) -> None:
        """Raise ValueError unless the template's parts have the tokens of the whole text."""
        takes: list[str | None] = [None] if template.instructed is None else [None, "Find the answer.", "a"]
        tokenize = PairTokenizer(self.tokenizer, template)
        for instruction in takes:
            words = template.with_instruction(instruction)
            pairs = list(_probes())
            for (query, passage), built in zip(
                pairs, tokenize.build(pairs, 10**6, 10**6, 3 * 10**6, words), strict=True
            ):
                texts = {"query": query, "passage": passage}
                if instruction is not None:
                    texts["instruction"] = instruction
                whole = self._ids(self._render(texts))
                if built.input_ids.tolist() != whole:
                    raise ValueError(
                        f"the chat template cannot be cut: of {texts} its pieces make "
                        f"{self.tokenizer.decode(built.input_ids)!r}, and the whole is {self.tokenizer.decode(whole)!r}"
                    )


def _probes() -> Iterator[tuple[str, str]]:
    """Yield pairs of texts. Each text is paired with several other texts."""
    yield from pairwise((*PROBES, *PROBES[::-1], *PROBES[::2]))


def _probes_of(names: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, (first, second) in enumerate(_probes()):
        third = PROBES[number % len(PROBES)] or "a"
        texts = {"query": first, "passage": second, "instruction": third}
        yield {name: texts[name] for name in names}
