"""Paragraphs of prose and queries made from their own words: a sentence, a question, keywords, a long request."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import log

from docstrings import Pair
from sources.questions import questions
from sources.texts import STOP_WORDS, cut, is_english, plain, seeded, sentences, words_of

PARAGRAPH, ARTICLE = (50, 160), (130, 300)
"""Words of a passage, at least and at most."""
COMMON = 0.005
FIELDS = re.compile(r"\b(?:Parameters|Args|Returns|Attributes|Raises|Yields|See Also|toctree|param)\b|::| : ")
DANGLING = re.compile(
    r"\b(?:it|its|this|that|these|those|they|their|them|he|she|his|her|such|following|above|below|another|here|then|also|however|moreover|otherwise|similarly|needless|yes|no|therefore|instead|thus|hence|finally)\b",
    re.IGNORECASE,
)
BEFORE_NOUNS = frozenset(re.findall(r"\w+", "a an the of by with for in on from between its each every no some any"))
REQUESTS = [
    "what is known about {a} and its relation to {b}, in particular with regard to {c}",
    "has anyone described how {a} depends on {b} and what that means for {c}",
    "what are the effects of {a} on {b} where {c} is concerned",
    "I am looking for an explanation of {a}, with something about {b} and {c}",
    "what work has been done on {a} that also treats {b}, {c} or {d}",
    "is there any account of {a} which takes {b} into consideration as well as {c}",
    "discussion of {a} and {b}, and of the part that {c} has in it, with mention of {d}",
    "how do {a} and {b} differ, and which of the two matters when it comes to {c}",
    "why would {a} have to do with {b}, and is {c} a reason for it",
    "what must be considered about {a} when {b} is used together with {c} and {d}",
    "papers or notes on {a}, {b} and {c}, preferably those that mention {d}",
    "my question is about {a}: I have read that {b} plays a role in it, but what about {c}?",
]
CLAIMS = [
    "is it true that {s}?",
    "I read somewhere that {s}. Where is that explained?",
    "evidence that {s}",
    "Find texts which say that {s}.",
    "what speaks for the view that {s}?",
    "why do people say that {s}?",
]


def passages_of(texts: Iterable[str], size: tuple[int, int]) -> Iterator[str]:
    """The texts that are English prose of so many words and three sentences at least, longer ones cut."""
    least, most = size
    for text in texts:
        text = cut(plain(text), seeded(text), most - 20)
        if (
            least <= len(text.split()) <= most
            and len(sentences(text)) >= 3
            and is_english(text)
            and not FIELDS.search(text)
        ):
            yield text


class Prose:
    """Makes queries for paragraphs, knowing how many of them each word is in."""

    def __init__(self, passages: Sequence[str]) -> None:
        self.spread = Counter(word for text in passages for word in {word.lower() for word in words_of(text)})
        self.size = len(passages)
        self.most = max(3, COMMON * self.size)

    def is_rare(self, word: str) -> bool:
        """Whether a word says what a paragraph is about; one that is nowhere else may be a slip or a name."""
        return (
            len(word) > 2
            and word[0].isalpha()
            and word.lower() not in STOP_WORDS
            and self.spread[word.lower()] <= self.most
        )

    def says_enough(self, query: str, rare: int) -> bool:
        """Whether a query can be understood without its paragraph and has so many rare words."""
        start = " ".join(query.split()[:8])
        if not query[0].isupper() or query[-1] in ":)" or DANGLING.search(start) or re.match(r"\w+: ", query):
            return False
        return sum(self.is_rare(word) for word in words_of(query)) >= rare

    def keywords(self, passage: str, rng: random.Random) -> str | None:
        """Two to five of the words that set a paragraph apart (tf-idf) in the order of their appearance."""
        words = [word for word in words_of(passage) if self.is_rare(word)]
        weight = {word: words.count(word) * log(self.size / self.spread[word.lower()]) for word in words}
        chosen = set(sorted(weight, key=weight.get, reverse=True)[: rng.randint(2, 5)])
        return " ".join(word for word in weight if word in chosen) if len(chosen) >= 2 else None

    def phrases(self, passage: str) -> list[str]:
        """Runs of up to three words between function words and punctuation, those with a rare word, in order."""
        found = []
        for part in re.split(r"[^\w\s'-]+", passage):
            for run in self.runs(part.split()):
                if len(run) <= 3 and any(self.is_rare(word) for word in run) and not run[-1].endswith(("ed", "ing")):
                    found.append(" ".join(run))
        return list(dict.fromkeys(found))

    @staticmethod
    def runs(words: Sequence[str]) -> list[list[str]]:
        """The words between function words, an article or a preposition before them: most are noun phrases."""
        runs, run = [], None
        for word in [*words, "the"]:
            if word.lower() in STOP_WORDS or not word[0].isalpha():
                runs += [run] if run else []
                run = [] if word.lower() in BEFORE_NOUNS else None
            elif run is not None:
                run.append(word)
        return runs

    def request(self, passage: str, rng: random.Random) -> str | None:
        """A long request that names what the paragraph is about."""
        phrases = self.phrases(passage)
        if len(phrases) < 4:
            return None
        places = sorted(rng.sample(range(len(phrases)), 4))
        return rng.choice(REQUESTS).format(**dict(zip("abcd", (phrases[place] for place in places), strict=True)))

    def pair(self, passage: str, rng: random.Random) -> Pair | None:
        """A query for a paragraph, of a kind drawn at random; a question where one can be made, more often than not."""
        parts = sentences(passage)
        asked = [
            (at, question)
            for at, part in enumerate(parts)
            for question in questions(part)
            if self.says_enough(question, 1)
        ]
        if asked and rng.random() < 0.7:
            return Pair(rng.choice(asked[:4])[1], passage)
        draw = rng.random()
        if draw < 0.4:
            return self.cloze(parts, rng)
        if draw < 0.6:
            query = self.keywords(passage, rng)
        else:
            query = self.request(passage, rng) if draw < 0.8 else self.claim(parts, rng)
        return Pair(query, passage) if query else None

    def cloze(self, parts: Sequence[str], rng: random.Random) -> Pair | None:
        """One sentence, the first two or the first half as the query, in most cases no longer in the passage."""
        draw = rng.random()
        size = len(parts) // 2 if draw < 0.15 else 2 if draw < 0.4 else 1
        start = 0 if size > 1 else rng.randrange(len(parts))
        query = " ".join(parts[start : start + size])
        rest = [*parts[:start], *parts[start + size :]] if rng.random() < 0.8 else parts
        if not 6 <= len(query.split()) <= 80 or not self.says_enough(query, 2):
            return None
        passage = " ".join(rest)
        return Pair(query, passage) if len(passage.split()) >= 25 else None

    def claim(self, parts: Sequence[str], rng: random.Random) -> str | None:
        """A sentence of the paragraph that somebody asks about."""
        fit = [
            part
            for part in parts
            if 8 <= len(part.split()) <= 30
            and self.says_enough(part, 2)
            and re.match(r"(?:The|An?|[A-Z][a-z]+s) [a-z]", part)
        ]
        if not fit:
            return None
        sentence = rng.choice(fit).rstrip(".!?:")
        return rng.choice(CLAIMS).format(s=sentence[0].lower() + sentence[1:])


def prose_pairs(seed: int, texts: Iterable[str], size: tuple[int, int] = PARAGRAPH) -> Iterator[Pair]:
    """A pair for each passage of `size` words that a query can be made for."""
    passages = list(dict.fromkeys(passages_of(texts, size)))
    made = Prose(passages)
    for passage in passages:
        if pair := made.pair(passage, seeded(seed, "prose", passage)):
            yield pair
