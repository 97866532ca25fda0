"""Two halves of the queries: by one something is chosen or fitted, on the other it is reported. The best of many
settings owes some of its lead to the queries that it was chosen by."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
FEW = 25
"""Fewer queries than this in a half leave shares of nDCG@10 to chance."""


def chooses(query: str) -> bool:
    """Whether a query, by its id alone, is in the half that chooses: in every sample of its collection the same."""
    return hashlib.sha256(query.encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Halves:
    """Places of queries, those that choose and those that are held out."""

    choosing: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, queries: Iterable[str]) -> Halves:
        """The halves of queries, by their ids."""
        sides = [chooses(query) for query in queries]
        return cls(*(tuple(place for place, side in enumerate(sides) if side is wanted) for wanted in (True, False)))

    @property
    def are_two(self) -> bool:
        """Whether there is a query in each."""
        return bool(self.choosing and self.held_out)

    def check(self) -> None:
        """Warn where there are few queries in a half.

        Raises:
            ValueError: where there are none.
        """
        sizes = f"{len(self.choosing)} queries choose and {len(self.held_out)} are held out"
        if not self.are_two:
            raise ValueError(f"{sizes}, by the hashes of their ids: a plan needs some of both; take more queries")
        if min(len(self.choosing), len(self.held_out)) < FEW:
            logger.warning("%s: with fewer than %d in a half, what is chosen is chosen by chance", sizes, FEW)


def at(values: Sequence[T], places: Sequence[int]) -> list[T]:
    """The values at some places."""
    return [values[place] for place in places]
