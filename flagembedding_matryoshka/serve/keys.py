"""Bearer tokens: one, or several with names from a file that may change while the server runs."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

UNNAMED = "key"
"""Name of a key that the file gives none."""
EMPTY = "the API key in {} is empty: write a key, or leave it out."
logger = logging.getLogger(__name__)


class Keys:
    """The keys that requests may have.

    Args:
        keys: keys by their names.
        path: the file that they are from; if it changes, it is read again. None is no file.
    """

    def __init__(self, keys: Mapping[str, bytes], path: Path | None = None) -> None:
        self._keys = keys
        self._path = path
        self._version = None if path is None else _version(path)

    @classmethod
    def of_one(cls, key: bytes, source: str) -> Keys:
        """Return a single key. White space of ASCII around it does not count.

        Raises:
            ValueError: if there is nothing else in `source`.
        """
        if not key.strip():
            raise ValueError(EMPTY.format(source))
        return cls({UNNAMED: key.strip()})

    @classmethod
    def of_file(cls, path: Path) -> Keys:
        """Read a file of keys. Raises as `read_keys`, and OSError if the file cannot be read."""
        return cls(read_keys(path.read_bytes(), str(path)), path)

    def name_of(self, given: bytes) -> str | None:
        """Return the name of a key; None if it is not one of the keys. The time does not depend on the keys' bytes."""
        self._read_again()
        names = [name for name, key in self._keys.items() if hmac.compare_digest(given, key)]
        return names[0] if names else None

    def _read_again(self) -> None:
        """If the file has changed, read it. If it cannot be read, the keys stay, and the log says so once."""
        if self._path is None or (version := _version(self._path)) == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path.read_bytes(), str(self._path))
            logger.info("%s has changed: its keys are %s", self._path, ", ".join(self._keys))
        except (OSError, ValueError) as error:
            logger.error("the keys stay as they were: %s", error)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return numbers that change with the file; None if it cannot be asked for them."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def read_keys(text: bytes, source: str) -> dict[str, bytes]:
    """Return keys by their names. A line is a name and a key, or the only key.

    White space of ASCII around them does not count.

    Raises:
        ValueError: if there is no key, a line has more than two words, or two keys have one name.
    """
    keys: dict[str, bytes] = {}
    # Of bytes, because str.split splits at U+00A0 and U+0085, too, whose bytes end letters in UTF-8.
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if len(words) > 2:
            raise ValueError(
                f"line {number} of {source} has {len(words)} words, but must be NAME KEY, or a single KEY."
            )
        if words:
            name = words[0].decode(errors="replace") if len(words) == 2 else UNNAMED
            if name in keys:
                raise ValueError(f"line {number} of {source}: two keys are named {name!r}. Write NAME KEY.")
            keys[name] = words[-1]
    if not keys:
        raise ValueError(EMPTY.format(source))
    return keys
