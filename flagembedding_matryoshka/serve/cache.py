"""A cache of scores. Only scores that do not depend on the other pairs of their batch belong into it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.pairs import TokenizedPair

Key = bytes
BYTES_OF_A_SCORE = 320
"""Memory of an entry, measured at the most in a full cache whose entries are replaced."""


class ScoreCache:
    """Scores by their keys. If it is full, the scores that were not asked for the longest time make room.

    Args:
        bytes: most bytes of memory.

    Attributes:
        found, missed: numbers of scores that `find` found, and did not find.

    Raises:
        ValueError: if there is no room for a score.
    """

    def __init__(self, bytes: int) -> None:
        if bytes < BYTES_OF_A_SCORE:
            raise ValueError(f"cache_bytes is {bytes}, but must be at least {BYTES_OF_A_SCORE}, the bytes of a score.")
        self._most = bytes // BYTES_OF_A_SCORE
        self._scores: OrderedDict[Key, float] = OrderedDict()
        self.found = 0
        self.missed = 0

    @property
    def held(self) -> int:
        """Bytes of memory that the scores hold."""
        return BYTES_OF_A_SCORE * len(self._scores)

    def find(self, keys: Sequence[Key]) -> list[float | None]:
        """Return the score of each key; None if it is not in the cache."""
        scores = [self._scores.get(key) for key in keys]
        for key, score in zip(keys, scores, strict=True):
            if score is not None:
                self._scores.move_to_end(key)
        missed = scores.count(None)
        self.found += len(scores) - missed
        self.missed += missed
        return scores

    def store(self, keys: Sequence[Key], scores: Sequence[float]) -> None:
        """Store the score of each key."""
        for key, score in zip(keys, scores, strict=True):
            self._scores[key] = score
            self._scores.move_to_end(key)
            if len(self._scores) > self._most:
                self._scores.popitem(last=False)


def score_keys(fingerprint: str, setting: Setting, pairs: Sequence[TokenizedPair]) -> list[Key]:
    """Return a hash for each pair, of all that its score depends on: the model, the setting and the token ids.

    Args:
        fingerprint: result of `model_fingerprint`.
        setting: depth and width, without a cascade.
    """
    keys = []
    for lead, of_query in groupby(pairs, key=attrgetter("lead")):
        prefix = hashlib.blake2b(f"{fingerprint} {setting!r} {len(lead.ids)} ".encode(), digest_size=32)
        prefix.update(lead.ids.tobytes())
        for pair in of_query:
            key = prefix.copy()
            key.update(f"{pair.passage_length} {pair.prompt_length} ".encode())
            key.update(pair.passage_ids.tobytes() + pair.prompt_ids.tobytes())
            keys.append(key.digest())
    return keys
