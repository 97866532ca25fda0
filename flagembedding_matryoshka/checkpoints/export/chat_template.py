"""A template as a chat template in Jinja, with the roles system (the instruction), query and document.

Other runtimes tokenise the rendered text as a whole, but this package tokenises query, passage and fixed words
separately. If a tokenizer would join two of them, the template puts a `SEAM` between them, at which the exported
tokenizer splits the text.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flagembedding_matryoshka.checkpoints.chat_templates import MARKS, PROBES
from flagembedding_matryoshka.text.pairs import PairTokenizer
from flagembedding_matryoshka.text.templates import Template

SEAM = "\ue010"
"""A character of the private use area that the exported tokenizer removes after it has split the text there."""
VARIABLES = {"instruction": "ns.instruction", "query": "ns.query", "passage": "ns.document"}
ROLES = """\
{%- set ns = namespace(instruction=none, query=none, document=none) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{%- set ns.instruction = message['content'] -%}
{%- elif message['role'] == 'query' -%}{%- set ns.query = message['content'] -%}
{%- elif message['role'] == 'document' -%}{%- set ns.document = message['content'] -%}
{%- else -%}{{- raise_exception("the roles are system, query and document, got " ~ message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if ns.query is none or ns.document is none -%}
{{- raise_exception("messages of the roles query and document are needed") -}}
{%- endif -%}
"""
INSTRUCTIONS = """\
{{%- if ns.instruction is none -%}}
{{%- set ns.instruction = instruct if instruct is defined else {default} -%}}
{{%- if instruction is defined -%}}{{%- set ns.instruction = instruction -%}}{{%- endif -%}}
{{%- endif -%}}
"""
ENDS = ("c\n\n", "  ", "\n\nd", "e \n", "\t\tf", "g  ", " \n h")
"""Texts whose first or last characters a tokenizer may join with the words beside them."""
TASKS = (None, "", "Find the answer.", "a")
"""Instructions that test a chat template."""


def chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: Template, config: PreTrainedConfig
) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose chat template renders `template`, with the same tokens.

    The chat template writes the begin-of-sequence token, so that the tokenizer adds none. It pads on the right.

    Args:
        tokenizer: the re-ranker's tokenizer. It is not changed.
        template: the template, with the default instruction.
        config: configuration of the exported model, by which AutoTokenizer chooses a class. Some classes ignore
            tokenizer.json and split text by their own rules.

    Raises:
        ValueError: if the tokenizer has no tokenizer.json, or the rendered text has other tokens than the template. The
            error names the texts and both lists of tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, which other runtimes read: save the "
            "checkpoint with a fast tokenizer."
        )
    fault = ""
    for seam, backend in _backends(tokenizer.backend_tokenizer):
        made = _with_backend(tokenizer, backend, chat_template(tokenizer, template, seam))
        made.pad_token = made.convert_ids_to_tokens(config.pad_token_id)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            made.save_pretrained(folder)
            read = AutoTokenizer.from_pretrained(folder)
        fault = difference(read, tokenizer, template)
        if not fault:
            return made
    raise ValueError(
        f"the template cannot be written as a chat template of a {config.model_type}, whose tokenizer is a "
        f"{type(read).__name__}: {fault}"
    )


def chat_template(tokenizer: PreTrainedTokenizerBase, template: Template, seam: str = "") -> str:
    """Return a template as a chat template in Jinja.

    The instruction is the content of the role system. Without this role it is the variable `instruction` or
    `instruct`, and without these variables the default instruction.

    Args:
        tokenizer: a tokenizer with the begin-of-sequence token.
        seam: text between two pieces that are tokenised separately.
    """
    pairs = PairTokenizer(tokenizer, template)
    opening = str(tokenizer.decode(pairs.opening(template), skip_special_tokens=False))
    plain = _expression(template, opening, seam)
    if template.instructed is None:
        return f"{ROLES}{{{{- {plain} -}}}}"
    instructed = _expression(template.with_instruction(MARKS["instruction"]), opening, seam)
    given = "ns.instruction | trim" if "instruction" in template.strip else "ns.instruction"
    return (
        f"{ROLES}{INSTRUCTIONS.format(default=_literal(template.instruction))}"
        f"{{%- if {given} -%}}\n{{{{- {instructed} -}}}}\n{{%- else -%}}\n{{{{- {plain} -}}}}\n{{%- endif -%}}"
    )


def rendered_pieces(template: Template, seam: str, query: str, passage: str) -> str:
    """Return two texts with the template's words, with `seam` between pieces that are tokenised separately."""
    texts = [template.query(query), template.between, template.passage(passage)]
    pieces: list[str] = []
    for words in (
        template.before,
        *(texts[::-1] if template.passage_first else texts),
        template.behind,
        template.prompt,
    ):
        pieces += [words] if isinstance(words, str) else words
    return seam.join(filter(None, pieces))


def difference(tokenizer: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase, template: Template) -> str:
    """Describe the first pair of texts whose tokens differ between a chat template and `template`.

    Args:
        tokenizer: the exported tokenizer, with the chat template.
        original: the re-ranker's tokenizer.

    Returns:
        The texts with both lists of tokens; "" if no tokens differ.
    """
    pairs, tasks = PairTokenizer(original, template), TASKS if template.instructed is not None else (None,)
    for task in tasks:
        words = template.with_instruction(task)
        texts = list(probes())
        for (query, passage), built in zip(texts, pairs.build(texts, 10**6, 10**6, 3 * 10**6, words), strict=True):
            messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
            options: dict[str, Any] = {} if task is None else {"instruction": task}
            rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer(rendered, verbose=False)["input_ids"]
            expected = built.input_ids.tolist()
            if ids != expected:
                return (
                    f"of the query {query!r}, the document {passage!r} and the instruction {task!r} it renders "
                    f"{rendered!r}, whose tokens {tokenizer.convert_ids_to_tokens(ids)} are not the template's "
                    f"{original.convert_ids_to_tokens(expected)}."
                )
    return ""


def probes() -> Iterator[tuple[str, str]]:
    """Yield pairs of texts. Each text is paired with several other texts."""
    texts = (*PROBES, *ENDS)
    yield from pairwise((*texts, *texts[::-1], *texts[::2]))


def _expression(template: Template, opening: str, seam: str) -> str:
    """Return a Jinja expression of the whole text."""
    text = opening + rendered_pieces(template, seam, MARKS["query"], MARKS["passage"])
    names = {mark: name for name, mark in MARKS.items()}
    parts = re.split(f"([{''.join(MARKS.values())}])", text)
    terms = []
    for part in filter(None, parts):
        name = names.get(part)
        if name is None:
            terms.append(_literal(part))
        else:
            terms.append(f"({VARIABLES[name]} | trim)" if name in template.strip else VARIABLES[name])
    return " ~ ".join(terms)


def _literal(text: str) -> str:
    """Return a string literal of Jinja, whose escapes are those of Python."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    for character, name in (("\n", "n"), ("\r", "r"), ("\t", "t")):
        escaped = escaped.replace(character, f"\\{name}")
    return '"' + escaped.replace(SEAM, f"\\u{ord(SEAM):04x}") + '"'


def _backends(backend: Tokenizer) -> Iterator[tuple[str, Tokenizer]]:
    """Yield seams, each with a tokenizer that splits text there, the simplest first."""

    def plain() -> Tokenizer:
        made: Tokenizer = copy.deepcopy(backend)
        made.post_processor = None
        made.no_padding()
        made.no_truncation()
        return made

    yield "", plain()
    split = pre_tokenizers.Split(SEAM, behavior="removed")
    at_seams = plain()
    own = at_seams.pre_tokenizer
    at_seams.pre_tokenizer = split if own is None else pre_tokenizers.Sequence([split, own])
    yield SEAM, at_seams
    # SentencePiece puts a blank before a text. Here it stands before each piece.
    blanks = plain()
    own = blanks.pre_tokenizer
    behind_seams = normalizers.Replace(SEAM, f"{SEAM}\u2581")
    blanks.normalizer = (
        behind_seams if blanks.normalizer is None else normalizers.Sequence([blanks.normalizer, behind_seams])
    )
    blanks.pre_tokenizer = split if own is None else pre_tokenizers.Sequence([split, own])
    yield SEAM, blanks


def _with_backend(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, chat_template: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the general class, because some classes rebuild their backend from the vocabulary."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_template,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **{
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str) and name != "additional_special_tokens"
        },
    )
