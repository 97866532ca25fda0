import random
import re

import bm25s
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from flagembedding_matryoshka.mining import bm25
from flagembedding_matryoshka.mining.bm25 import BM25, WORD, split_unspaced
from tests.encoders import WORDS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("猫が好き。", ["猫が", "が好", "好き"]),
        ("ABC社の株価", ["ABC", "社の", "の株", "株価"]),
        ("猫 a", ["猫"]),
        ("サッカー・ボール", ["サッ", "ッカ", "カー", "ボー", "ール"]),
        ("한국어", ["한국", "국어"]),
        ("น้ำมัน", ["น้ำ", "ำมั", "มัน"]),  # marks stay with their letter
        ("wing's naïve x", ["wing", "naïve"]),
    ],
)
def test_scripts_without_spaces_become_bigrams(text, words):
    assert re.findall(WORD, split_unspaced(text)) == words


@given(st.text(st.characters(max_codepoint=0x0DFF)))
def test_other_words_are_those_of_bm25s(text):
    ours = bm25s.tokenize([split_unspaced(text)], token_pattern=WORD, return_ids=False, show_progress=False)
    assert ours == bm25s.tokenize([text], return_ids=False, show_progress=False)


@pytest.mark.parametrize(
    ("texts", "query", "best"),
    [
        (["东京是日本的首都。", "北京是中国的首都。", "猫喜欢睡觉。"], "中国首都在哪里?", 1),
        (["東京は日本の首都です。", "猫は寝るのが好きです。"], "猫が好き", 1),
        (["กรุงเทพเป็นเมืองหลวงของไทย", "แมวชอบนอนหลับ"], "แมวนอน", 1),
        (["서울은 한국의 수도이다.", "고양이는 잠을 좋아한다."], "고양이가 좋아하는 것", 1),
    ],
)
def test_passages_in_scripts_without_spaces_are_found(texts, query, best):
    (found,) = BM25(texts).lists([query], 3)
    assert next(iter(found)) == best


def test_lists_and_pairs_have_the_scores_of_all_texts(monkeypatch):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(80)]
    queries = ["wing lift", "the", "wing wing lift", "unheard", "", "heat unheard shock", "wing lift"]
    index = BM25(texts)
    scores = np.stack([index.scores(query) for query in queries])
    assert (scores[[1, 3, 4]] == 0).all() and (scores[2] > scores[0]).any()
    monkeypatch.setattr(bm25, "QUERIES_AT_ONCE", 3)
    for row, found in zip(scores, index.lists(queries, 20), strict=True):
        assert list(found.values()) == pytest.approx(np.sort(row[row > 0])[::-1][:20])
        assert found == pytest.approx({place: row[place] for place in found})
    monkeypatch.setattr(bm25, "PAIRS_AT_ONCE", 13)
    pairs = [(number, draw.randrange(80)) for number in range(7) for _ in range(9)]
    numbers, places = map(list, zip(*pairs, strict=True))
    found = index.pair_scores([queries[number] for number in numbers], places)
    assert found == pytest.approx(scores[numbers, places], rel=1e-5) and len(set(found.tolist())) > 10
