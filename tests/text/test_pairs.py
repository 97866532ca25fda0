import copy
import json
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from transformers import AutoTokenizer

from flagembedding_matryoshka.text.pairs import (
    PairTokenizer,
    find_head_token_id,
    find_head_token_ids,
)
from flagembedding_matryoshka.text.templates import Template

DIGITS = st.text("0123456789", max_size=8)
"""Texts of which each character is a token of `tiny_tokenizer`."""


@pytest.fixture(scope="module")
def pair_tokenizer(tiny_tokenizer):
    return PairTokenizer(tiny_tokenizer)


def test_pairs_become_the_ids_of_the_reference(shared_parity):
    golden = json.loads((shared_parity / "scores.json").read_text())
    pair_tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(shared_parity / "tokenizer"))
    template = Template()
    words = {name: getattr(template, name) for name in ("prompt", "query_instruction", "passage_instruction")}
    assert words == {name: golden[name] for name in words}
    lengths = (golden["query_max_length"], golden["max_length"])
    pairs = pair_tokenizer.build(golden["pairs"], *pair_tokenizer.lengths_within(*lengths, template), template)
    assert [pair.input_ids.tolist() for pair in pairs] == golden["input_ids"]
    assert [pair.query_length for pair in pairs] == golden["query_lengths"]
    assert [pair.prompt_length for pair in pairs] == golden["prompt_lengths"]


def without_words(pair_tokenizer):
    return pair_tokenizer.ids_of(replace(pair_tokenizer.template, query_instruction="")).query


def join(pair_tokenizer, query, passage, max_length):
    template = replace(pair_tokenizer.template, query_instruction="", passage_instruction="")
    (pair,) = pair_tokenizer.build([(query, passage)], 100, 100, max_length, template)
    return pair


@given(query=DIGITS, passage=DIGITS, spare=st.integers(0, 12))
def test_the_passage_alone_is_cut(pair_tokenizer, query, passage, spare):
    between, behind, prompt = (pair_tokenizer.fixed(text).tolist() for text in ("\n", "\n", Template().prompt))
    head = [*pair_tokenizer.opening(Template()).tolist(), *pair_tokenizer.fixed(query).tolist(), *between]
    assert len(head) == 1 + len(query) + len(between)
    if spare == 0 and passage:
        with pytest.raises(ValueError, match=f"query of {len(query)} tokens leaves no room.* fit into {len(head)}"):
            join(pair_tokenizer, query, passage, len(head))
        return
    pair = join(pair_tokenizer, query, passage, len(head) + spare)
    assert pair.is_cut == (spare < len(passage))
    assert pair.input_ids.tolist() == head + pair_tokenizer.fixed(passage[:spare]).tolist() + behind + prompt
    assert (pair.query_length, pair.prompt_length) == (len(head), len(behind + prompt))


def test_a_query_longer_than_the_limit_is_refused_even_without_passage(pair_tokenizer):
    with pytest.raises(
        ValueError, match=r"a query of 9 tokens leaves no room .* with 2 other tokens it must fit into 10"
    ):
        join(pair_tokenizer, "5" * 9, "", 10)
    assert join(pair_tokenizer, "5" * 9, "", 11).query_length == 11


def test_a_query_of_which_nothing_would_be_left_is_refused(pair_tokenizer):
    with pytest.raises(ValueError, match="max_length=1 leaves no token of a query"):
        pair_tokenizer.lengths_within(None, 1, Template())
    (pair,) = pair_tokenizer.build([("wing", "air")], *pair_tokenizer.lengths_within(1, 1, Template()))
    assert pair.query_length > 1


@pytest.mark.parametrize(
    ("bos", "pad", "kept"), [("<s>", "<pad>", True), ("<s>", "<s>", False), (None, "<pad>", False)]
)
def test_bos_opens_a_sequence_unless_there_is_none_or_it_pads(tiny_tokenizer, bos, pad, kept):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token, tokenizer.pad_token = bos, pad
    pair_tokenizer = PairTokenizer(tokenizer, Template(prompt=""))
    bos_ids, separator = [tiny_tokenizer.bos_token_id] if kept else [], pair_tokenizer.fixed("\n")
    pair, (two, three) = join(pair_tokenizer, "2", "3", 10), pair_tokenizer.fixed("23")
    assert pair.input_ids.tolist() == [*bos_ids, two, *separator, three, *separator]
    assert pair.query_length == len(bos_ids) + 1 + len(separator)


@pytest.mark.parametrize("text", ["</s>", "a <s> b</s>", "<pad><unk>"])
def test_what_users_write_is_never_a_control_token(pair_tokenizer, tiny_tokenizer, text):
    ((ids, _),) = pair_tokenizer.encode([text], 50, without_words(pair_tokenizer)).values()
    assert tiny_tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tiny_tokenizer.all_special_ids)
    (pair,) = pair_tokenizer.build([(text, text)], 50, 50, 200)
    assert sum(token in tiny_tokenizer.all_special_ids for token in pair.input_ids) == 1, "bos alone"
    assert set(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) & set(tiny_tokenizer.all_special_ids)


@given(st.lists(st.text(max_size=40), max_size=4), st.integers(1, 10))
def test_ids_are_the_texts_own_and_cut_at_the_end(pair_tokenizer, texts, max_length):
    words = without_words(pair_tokenizer)
    whole = pair_tokenizer.encode(texts, 200, words)
    assert list(whole) == list(dict.fromkeys(texts))
    assert [pair_tokenizer.tokenizer.decode(ids) for ids, _ in whole.values()] == list(whole)
    for text, (ids, is_cut) in pair_tokenizer.encode(texts, max_length, words).items():
        assert ids.dtype == np.int32 and ids.tolist() == whole[text].ids[:max_length].tolist()
        assert is_cut == (len(whole[text].ids) > max_length) and not whole[text].is_cut


def test_cutting_leaves_the_tokenizer_as_it_was(pair_tokenizer, tiny_tokenizer):
    pair_tokenizer.encode(["how does a wing lift"] * 2, 2, without_words(pair_tokenizer))
    assert tiny_tokenizer.backend_tokenizer.truncation is None
    assert tiny_tokenizer.backend_tokenizer.padding is None


def test_only_the_ids_of_the_last_templates_are_kept(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.text.pairs.TEMPLATES_REMEMBERED", 8)
    tokenizer = PairTokenizer(tiny_tokenizer)
    for _ in range(2):
        for number in range(30):
            template = Template(prompt=f"prompt {number}")
            found = tokenizer.ids_of(template).closing
            assert found is tokenizer.ids_of(Template(prompt=f"prompt {number}")).closing
            expected = tiny_tokenizer(f"prompt {number}", add_special_tokens=False)["input_ids"]
            assert found.tolist()[-len(expected) :] == expected
    assert len(tokenizer._known) == 8


def test_templates_that_differ_in_how_they_take_an_instruction_have_ids_of_their_own(tiny_tokenizer):
    tokenizer = PairTokenizer(tiny_tokenizer)
    first, second = (Template(instructed={"query_instruction": "{instruction}"}) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    other = Template(instructed={"query_instruction": "task: {instruction}"})
    assert other != first
    ids = [tokenizer.ids_of(template.with_instruction("wings")).query.ids.tolist() for template in (first, other)]
    assert ids[0] != ids[1] and tiny_tokenizer.decode(ids[1]).startswith("task: wings")


def test_another_separator(tiny_tokenizer):
    pair = join(PairTokenizer(tiny_tokenizer, Template(between=" | ", behind=" / ")), "20", "30", 20)
    text = tiny_tokenizer.decode(pair.input_ids)
    assert text.count(" | ") == text.count(" / ") == 1


@pytest.mark.parametrize("text", ["Yes", "Yes, it does"])
def test_heads_start_from_the_first_token(tiny_tokenizer, text):
    token = tiny_tokenizer.convert_tokens_to_ids("Yes")
    assert token != tiny_tokenizer.unk_token_id
    assert find_head_token_id(tiny_tokenizer, text) == find_head_token_id(tiny_tokenizer) == token


def test_words_of_a_head_must_differ(tiny_tokenizer):
    yes, no = find_head_token_ids(tiny_tokenizer, ["Yes", "no"])
    assert yes == tiny_tokenizer.convert_tokens_to_ids("Yes") and no != yes
    with pytest.raises(ValueError, match=r"head_tokens \['Yes', 'Yes, it does'\] begin with the same token"):
        find_head_token_ids(tiny_tokenizer, ["Yes", "Yes, it does"])
