"""Debian packages as a source of text: fetched with apt and read where they lie, never installed."""

import gzip
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

TRANSLATIONS = Path("/var/lib/apt/lists")
APT_HELPER = "/usr/lib/apt/apt-helper"


def fetch(package: str, cache: Path) -> Path | None:
    """The package's .deb in the cache, downloaded where it is not there yet; None, and a line, where that fails."""
    if found := next(cache.glob(f"{package}_*.deb"), None):
        return found
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        print(f"{package}: left out, apt-get and dpkg-deb are not here")
        return None
    cache.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["apt-get", "download", "-qq", package], cwd=cache, capture_output=True, text=True)
    if done.returncode:
        print(f"{package}: left out, {(done.stderr.strip().splitlines() or ['apt-get failed'])[-1]}")
    return next(cache.glob(f"{package}_*.deb"), None)


def version(deb: Path) -> str:
    """The version of a package file."""
    return subprocess.run(["dpkg-deb", "-f", deb, "Version"], capture_output=True, text=True, check=True).stdout.strip()


def members(deb: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Path (without .gz) and content of the files whose path has the pattern, gunzipped."""
    command = ["dpkg-deb", "--fsys-tarfile", deb]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and re.search(pattern, member.name):
                content = archive.extractfile(member).read()
                zipped = content[:2] == b"\x1f\x8b"
                yield member.name.removesuffix(".gz"), gzip.decompress(content) if zipped else content


def translations() -> Iterator[str]:
    """The English package descriptions that apt has fetched, one deb822 block at a time."""
    for path in sorted(TRANSLATIONS.glob("*Translation-en*")):
        done = subprocess.run([APT_HELPER, "cat-file", path], capture_output=True, text=True, check=True)
        yield from done.stdout.split("\n\n")
