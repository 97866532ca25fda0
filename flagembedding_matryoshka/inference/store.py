"""Stored passages: their states after a store layer, computed once and read for any query.

A store is a directory. `store.json` has the conditions that all states depend on. Each shard is a safetensors file of
states, and a JSON file with the ids of its passages, which is written after it: a shard without it is not complete. The
id of a deleted passage is null there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flagembedding_matryoshka.files import replacing, write_text
from flagembedding_matryoshka.inference.inputs import Pairs, Passage, as_iterable, excerpt
from flagembedding_matryoshka.inference.options import Call
from flagembedding_matryoshka.models.split import StateQuantization, to_int8
from flagembedding_matryoshka.setting import Setting
from flagembedding_matryoshka.text.encoding import Ids
from flagembedding_matryoshka.text.pairs import TokenizedPair

CONDITIONS = "store.json"
VERSION = 1
"""Version of the files' format."""
PASSAGES_AT_ONCE = 256
"""Passages that are tokenised together."""
SHARD_BYTES = 2**27
"""A shard ends with the first window of passages that brings it to this size."""
Compute = Callable[[Sequence[Ids]], list[Tensor]]
"""Returns the states of each passage of a batch, as `Engine.passage_states`."""


@dataclass(frozen=True, eq=False)
class StoredPair(TokenizedPair):
    """A pair whose passage is read from a store. Its `passage_ids` are zeros, one for each stored token.

    Attributes:
        states: (passage tokens, hidden) states of the passage after the store layer, on the CPU, in the model's dtype;
            or the rows of `to_int8`.
        store_layer, compress_ratio: those of the states, as in `Conditions`.
    """

    states: Tensor = field(kw_only=True)
    store_layer: int = field(kw_only=True)
    compress_ratio: int = field(kw_only=True)


@dataclass(frozen=True)
class Conditions:
    """The conditions that the states of stored passages depend on.

    Attributes:
        model: fingerprint of the weights as loaded, the tokenizer and the configuration.
        store_layer: number of layers that have run.
        compress_ratio: number of neighbouring tokens that became one after the store layer.
        token_adapter: ratio of the token adapter that the layers ran with; None if they ran without one.
        passage_instruction, passage_format, strips_passage, follows_words: the template's words around a passage, and
            how they are tokenised.
        passage_max_length: most tokens of a passage with these words.
        state_quantization: "int8" if states are stored as `to_int8` returns them; None if in the model's dtype.

    Raises:
        ValueError: if `state_quantization` is another one.
    """

    model: str
    store_layer: int
    compress_ratio: int
    token_adapter: int | None
    passage_instruction: str
    passage_format: str
    strips_passage: bool
    follows_words: bool
    passage_max_length: int
    state_quantization: StateQuantization | None = None

    def __post_init__(self) -> None:
        method = self.state_quantization
        if method is not None and method not in get_args(StateQuantization):
            allowed = " or ".join(map(repr, get_args(StateQuantization)))
            raise ValueError(f"state_quantization is {method!r}, but must be {allowed}, or None.")

    @classmethod
    def of(
        cls,
        model: str,
        call: Call,
        token_adapters: Collection[int] = (),
        state_quantization: StateQuantization | None = None,
    ) -> Conditions:
        """Return the conditions of a call.

        Args:
            model: fingerprint of the model.
            token_adapters: the ratios that the model has token adapters for.
            state_quantization: format of the states, as in `Conditions`.

        Raises:
            ValueError: if the call has no store layer, its template begins with the passage, its lengths leave no room
                for passages, or there is no such format.
        """
        setting, template, options = call.setting, call.template, call.options
        if not setting.store_layer:
            raise ValueError("store_layer is 0, but must be the number of layers after which passages are stored.")
        if template.passage_first:
            raise ValueError(
                "passages of a template with passage_first cannot be stored: words before them belong to the pair."
            )
        lengths = options.query_max_length, options.max_length
        _, passage_max_length, _ = call.tokenizer.lengths_within(*lengths, template, fits_all_queries=True)
        is_compressed = setting.compresses_after(setting.store_layer)
        return cls(
            model,
            setting.store_layer,
            setting.compress_ratio if is_compressed else 1,
            setting.compress_ratio if setting.compress_ratio in token_adapters else None,
            template.passage_instruction,
            template.passage_format,
            "passage" in template.strip,
            template.is_continuous,
            passage_max_length,
            state_quantization,
        )


class Place(NamedTuple):
    """Where a passage is stored: its shard, the tokens from `start` to `end`, whether it is truncated, and the digest
    of its text."""

    shard: int
    start: int
    end: int
    is_cut: bool
    digest: str


class PassageStore:
    """Passages of a store, by their ids. It has the passages that were there when it was opened, or that it wrote.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if its files are of another format.

    Attributes:
        path: the directory.
        conditions: the conditions of its states.
        nbytes: bytes of the states of its passages.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        noted = self.path / CONDITIONS
        if not noted.is_file():
            raise FileNotFoundError(f"there is no store {self.path}: it has no {CONDITIONS}.")
        values = json.loads(noted.read_text(encoding="utf-8"))
        if values.pop("version", None) != VERSION:
            raise ValueError(f"{noted} is not of version {VERSION}: store the passages again, in another directory.")
        try:
            self.conditions = Conditions(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{noted} cannot be read: {error}") from error
        self._shards: dict[int, Any] = {}
        self._read_indices()

    def _read_indices(self) -> None:
        self.nbytes = 0
        self._places: dict[str, Place] = {}
        self._tokens: list[int] = []
        while self._index(len(self._tokens)).is_file():
            self._add(json.loads(self._index(len(self._tokens)).read_text(encoding="utf-8")))

    @classmethod
    def create(cls, path: str | PathLike[str], conditions: Conditions) -> PassageStore:
        """Open a store, or make an empty one if there is none.

        Raises:
            ValueError: if the store has other conditions, or is of another format.
        """
        noted = Path(path) / CONDITIONS
        if not noted.is_file():
            noted.parent.mkdir(parents=True, exist_ok=True)
            write_text(noted, json.dumps({"version": VERSION, **asdict(conditions)}, indent=1) + "\n")
        store = cls(path)
        store.check(conditions)
        return store

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    @property
    def bytes_per_passage(self) -> float:
        """Mean bytes of the states of a passage; 0 without passages."""
        return self.nbytes / len(self) if self._places else 0.0

    def check(self, conditions: Conditions) -> None:
        """Raise ValueError, which names the differences, if the store has other conditions."""
        own, others = asdict(self.conditions), asdict(conditions)
        different = [f"{name}={own[name]!r}, and not {others[name]!r}" for name in own if own[name] != others[name]]
        if different:
            raise ValueError(
                f"the store {self.path} was made with {'; '.join(different)}. Use these, or store the passages in "
                "another directory."
            )

    def completed(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call, with the store's store layer and ratio where the call gives none."""
        given = {name: value for name, value in overrides.items() if value is not None}
        own = {"store_layer": self.conditions.store_layer, "compress_ratio": self.conditions.compress_ratio}
        return {**overrides, **own, **given}

    def pairs(self, query: str, passages: Sequence[Passage], call: Call, compute: Compute) -> list[StoredPair]:
        """Return the pairs of a query and passages. The states of passages that the store does not have are computed.

        Raises:
            ValueError: if the store has another text with an id, or lacks an id that is given without a text.
        """
        places = [self._place(number, *passage) for number, passage in enumerate(passages)]
        texts = [text for place, (_, text) in zip(places, passages, strict=True) if place is None and text is not None]
        computed = iter(self._compute(texts, call, compute))
        (pair,) = call.tokenize([(query, "")])
        layer, ratio = self.conditions.store_layer, self.conditions.compress_ratio
        found: list[StoredPair] = []
        for place in places:
            states, is_cut = next(computed) if place is None else (self._read(place), place.is_cut)
            ids = np.zeros(len(states), dtype=np.int32)
            of_pair = (pair.lead, ids, pair.prompt_ids, pair.query_is_cut, is_cut)
            found.append(StoredPair(*of_pair, states=states, store_layer=layer, compress_ratio=ratio))
        return found

    def _place(self, number: int, name: str | None, text: str | None) -> Place | None:
        """Return where a passage is stored; None if the store does not have it."""
        place = None if name is None else self._places.get(name)
        if place is None and text is None:
            raise ValueError(f"the store {self.path} has no passage with the id {excerpt(name)}.")
        if place is not None and text is not None:
            self._refuse_another_text(number, name, place.digest, _digest(text))
        return place

    def _refuse_another_text(self, number: int, name: str | None, own: str, other: str) -> None:
        if own != other:
            raise ValueError(
                f"passage {number} has the id {name!r}, under which the store {self.path} has another text: give it "
                "another id, or delete the stored passage."
            )

    def _compute(self, texts: Sequence[str], call: Call, compute: Compute) -> list[tuple[Tensor, bool]]:
        """Return the states of each text, in the store's format, and whether it is truncated."""
        encoded = call.tokenizer.passages(texts, self.conditions.passage_max_length, call.template)
        states = _in_batches([one.ids for one in encoded], call.options.max_tokens_per_batch, compute)
        if self.conditions.state_quantization is not None:
            states = list(map(to_int8, states))
        return [(own, one.is_cut) for own, one in zip(states, encoded, strict=True)]

    def add(self, passages: Mapping[str, str] | Iterable[tuple[str, str]], call: Call, compute: Compute) -> None:
        """Compute and write the states of passages that the store does not have. Complete shards stay after an error.

        Args:
            passages: {id: text}, or (id, text) of each passage.
            call: options of the texts; its conditions are those of the store.
            compute: computes states.

        Raises:
            TypeError: if a passage is not an id and a text, both strings.
            ValueError: if the store has another text with an id.
        """
        items = iter(passages.items() if isinstance(passages, Mapping) else passages)
        shard: list[tuple[str, str, bool, Tensor]] = []
        pending: dict[str, str] = {}
        read = 0
        while window := list(islice(items, PASSAGES_AT_ONCE)):
            texts: dict[str, str] = {}
            for number, item in enumerate(window, start=read):
                name, text = _as_passage(number, item)
                digest = _digest(text)
                known = self._places[name].digest if name in self._places else pending.get(name)
                if known is None:
                    pending[name], texts[name] = digest, text
                else:
                    self._refuse_another_text(number, name, known, digest)
            read += len(window)
            for name, (own, is_cut) in zip(texts, self._compute([*texts.values()], call, compute), strict=True):
                shard.append((name, pending[name], is_cut, own))
            if sum(own.nbytes for *_, own in shard) >= SHARD_BYTES:
                self._write(shard)
                shard, pending = [], {}
        if shard:
            self._write(shard)

    def delete(self, ids: Iterable[str]) -> None:
        """Delete passages. Their bytes are free when all passages of their shard are deleted.

        Stores that are open keep the passages, until they are opened anew or the shard's states are gone.

        Raises:
            ValueError: if there is no passage with an id; then none is deleted.
        """
        names = set(as_iterable("ids", ids))
        if unknown := [name for name in names if name not in self._places]:
            raise ValueError(f"the store {self.path} has no passage with the id {excerpt(unknown[0])}.")
        for shard in sorted({self._places[name].shard for name in names}):
            path = self._index(shard)
            index = json.loads(path.read_text(encoding="utf-8"))
            index["ids"] = [None if name in names else name for name in index["ids"]]
            write_text(path, json.dumps(index, ensure_ascii=False) + "\n")
            if not any(name is not None for name in index["ids"]):
                self._shards.pop(shard, None)
                self._states(shard).unlink()
        self._read_indices()

    def _write(self, shard: Sequence[tuple[str, str, bool, Tensor]]) -> None:
        """Write a shard: its states, and then its index."""
        number = len(self._tokens)
        with replacing(self._states(number)) as partial:
            save_file({"states": torch.cat([states for *_, states in shard])}, partial)
        names, digests, are_cut, states = zip(*shard, strict=True)
        index = {
            "ids": names,
            "digests": digests,
            "lengths": [len(own) for own in states],
            "cut": [place for place, is_cut in enumerate(are_cut) if is_cut],
            "bytes": sum(own.nbytes for own in states),
        }
        write_text(self._index(number), json.dumps(index, ensure_ascii=False) + "\n")
        self._add(index)

    def _add(self, index: Mapping[str, Any]) -> None:
        start, cut = 0, set(index["cut"])
        token_bytes = index["bytes"] // max(1, sum(index["lengths"]))
        for place, (name, digest, length) in enumerate(
            zip(index["ids"], index["digests"], index["lengths"], strict=True)
        ):
            if name is not None:
                self._places[name] = Place(len(self._tokens), start, start + length, place in cut, digest)
                self.nbytes += token_bytes * length
            start += length
        self._tokens.append(start)

    def _read(self, place: Place) -> Tensor:
        """Return the states of a passage, as in `StoredPair`. A shard is mapped into memory, and only they are read.

        Raises:
            ValueError: if the shard does not have the tokens of its index, or the format of the store.
        """
        if place.shard not in self._shards:
            path = self._states(place.shard)
            opened = safe_open(path, framework="pt").get_slice("states")
            if opened.get_shape()[0] != self._tokens[place.shard]:
                raise ValueError(
                    f"{path} has {opened.get_shape()[0]} tokens, and its index {self._tokens[place.shard]}: delete the "
                    "store, and store the passages again."
                )
            method = self.conditions.state_quantization
            if (opened.get_dtype() == "I8") != (method is not None):
                raise ValueError(
                    f"{path} has states in {opened.get_dtype()}, but the store has state_quantization={method!r}: "
                    "delete the store, and store the passages again."
                )
            self._shards[place.shard] = opened
        states: Tensor = self._shards[place.shard][place.start : place.end]
        return states

    def _states(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.safetensors"

    def _index(self, shard: int) -> Path:
        return self.path / f"{shard:05d}.json"


def whole_length(pair: TokenizedPair) -> int:
    """Return the number of passage tokens of a pair; of a stored passage at most, before its compression."""
    return pair.passage_length * (pair.compress_ratio if isinstance(pair, StoredPair) else 1)


def refuse_other_states(pairs: Pairs, setting: Setting) -> None:
    """Raise ValueError if pairs with stored passages are not those of a setting, are in several formats, or are beside
    pairs without."""
    stored = [pair for pair in pairs if isinstance(pair, StoredPair)]
    if not stored:
        return
    if len(stored) < len(pairs):
        raise ValueError("pairs of stored passages and other pairs need separate calls.")
    is_compressed = setting.compresses_after(setting.store_layer)
    wanted = setting.store_layer, setting.compress_ratio if is_compressed else 1
    for number, pair in enumerate(stored):
        if (pair.store_layer, pair.compress_ratio) != wanted:
            raise ValueError(
                f"pair {number} has a passage stored with store_layer={pair.store_layer} and compress_ratio="
                f"{pair.compress_ratio}, but the call has {wanted[0]} and {wanted[1]}."
            )
        if pair.states.dtype != stored[0].states.dtype:
            raise ValueError(
                f"pair {number} has a passage stored in {pair.states.dtype}, and pair 0 in {stored[0].states.dtype}: "
                "they need separate calls."
            )


def _as_passage(number: int, item: Any) -> tuple[str, str]:
    is_pair = isinstance(item, list | tuple) and len(item) == 2
    if not is_pair or not all(isinstance(text, str) for text in item):
        raise TypeError(f"passage {number} must be an id and a text, both strings, got {excerpt(item)}.")
    name, text = item
    return name, text


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _in_batches(passages: Sequence[Ids], max_tokens: int, compute: Compute) -> list[Tensor]:
    """Return the states of passages, computed in batches of similar lengths, in the order given."""
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place]))
    found: dict[int, Tensor] = {}
    while order:
        count = max(1, max_tokens // max(1, len(passages[order[0]])))
        batch, order = order[:count], order[count:]
        for place, states in zip(batch, compute([passages[place] for place in batch]), strict=True):
            found[place] = states
    return [found[place] for place in range(len(passages))]
