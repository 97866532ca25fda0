import copy
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given
from transformers import AutoTokenizer

from flagembedding_matryoshka.text.pairs import PROMPT, SEPARATOR, PairTokenizer, find_head_token_id

IDS = st.lists(st.integers(10, 99), max_size=8)


@pytest.fixture(scope="module")
def pair_tokenizer(tiny_tokenizer):
    return PairTokenizer(tiny_tokenizer)


def test_pairs_become_the_ids_of_the_reference(shared_parity):
    golden = json.loads((shared_parity / "scores.json").read_text())
    pair_tokenizer = PairTokenizer(AutoTokenizer.from_pretrained(shared_parity / "tokenizer"))
    queries, passages = zip(*golden["pairs"], strict=True)
    query_ids = pair_tokenizer.encode(
        [golden["query_instruction"] + query for query in queries], golden["query_max_length"]
    )
    passage_ids = pair_tokenizer.encode(
        [golden["passage_instruction"] + passage for passage in passages], golden["max_length"]
    )
    assert golden["prompt"] == PROMPT
    (prompt_ids,) = pair_tokenizer.encode([PROMPT])
    limit = golden["max_length"] + len(pair_tokenizer.separator_ids) + len(prompt_ids)
    pairs = [pair_tokenizer.join(*ids, prompt_ids, limit) for ids in zip(query_ids, passage_ids, strict=True)]
    assert [pair.input_ids for pair in pairs] == golden["input_ids"]
    assert [pair.query_length for pair in pairs] == golden["query_lengths"]
    assert [pair.prompt_length for pair in pairs] == golden["prompt_lengths"]


@given(query=IDS, passage=IDS, prompt=IDS, spare=st.integers(0, 12))
def test_the_passage_alone_is_cut(pair_tokenizer, query, passage, prompt, spare):
    head = [*pair_tokenizer.bos_ids, *query, *pair_tokenizer.separator_ids]
    tail = [*pair_tokenizer.separator_ids, *prompt]
    if spare == 0 and passage:
        with pytest.raises(ValueError, match=f"query of {len(query)} tokens leaves no room.* fit into {len(head)}"):
            pair_tokenizer.join(query, passage, prompt, len(head))
        return
    pair = pair_tokenizer.join(query, passage, prompt, len(head) + spare)
    assert pair.input_ids == head + passage[:spare] + tail
    assert (pair.query_length, pair.prompt_length) == (len(head), len(tail))


def test_a_query_longer_than_the_limit_is_refused_even_without_passage(pair_tokenizer):
    with pytest.raises(ValueError, match=r"a query of 9 tokens leaves no room .* with 2 tokens .* fit into 10"):
        pair_tokenizer.join([5] * 9, [], [], 10)
    assert pair_tokenizer.join([5] * 9, [], [], 11).query_length == 11


@pytest.mark.parametrize(
    ("bos", "pad", "kept"), [("<s>", "<pad>", True), ("<s>", "<s>", False), (None, "<pad>", False)]
)
def test_bos_opens_a_sequence_unless_there_is_none_or_it_pads(tiny_tokenizer, bos, pad, kept):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token, tokenizer.pad_token = bos, pad
    pair_tokenizer = PairTokenizer(tokenizer)
    bos_ids = [tiny_tokenizer.bos_token_id] if kept else []
    pair = pair_tokenizer.join([20], [30], [40], 10)
    assert pair.input_ids == [*bos_ids, 20, *pair_tokenizer.separator_ids, 30, *pair_tokenizer.separator_ids, 40]
    assert pair.query_length == len(bos_ids) + 1 + len(pair_tokenizer.separator_ids)


@given(st.lists(st.text(max_size=40), max_size=4), st.integers(1, 10))
def test_ids_are_the_texts_own_and_cut_at_the_end(pair_tokenizer, texts, max_length):
    whole = pair_tokenizer.encode(texts)
    assert [pair_tokenizer.tokenizer.decode(ids) for ids in whole] == texts
    assert pair_tokenizer.encode(texts, max_length) == [ids[:max_length] for ids in whole]


def test_cutting_leaves_the_tokenizer_as_it_was(pair_tokenizer, tiny_tokenizer):
    pair_tokenizer.encode(["how does a wing lift"] * 2, 2)
    assert tiny_tokenizer.backend_tokenizer.truncation is None
    assert tiny_tokenizer.backend_tokenizer.padding is None


def test_another_separator(tiny_tokenizer):
    separated = PairTokenizer(tiny_tokenizer, separator=" | ").join([20], [30], [], 20).input_ids
    assert tiny_tokenizer.decode(PairTokenizer(tiny_tokenizer).separator_ids) == SEPARATOR
    assert tiny_tokenizer.decode(separated).count(" | ") == 2


@pytest.mark.parametrize("text", ["Yes", "Yes, it does"])
def test_heads_start_from_the_first_token(tiny_tokenizer, text):
    token = tiny_tokenizer.convert_tokens_to_ids("Yes")
    assert token != tiny_tokenizer.unk_token_id
    assert find_head_token_id(tiny_tokenizer, text) == find_head_token_id(tiny_tokenizer) == token
