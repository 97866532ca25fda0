import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from flagembedding_matryoshka.files import replacing, write_text


def test_threads_write_one_file_and_leave_nothing_beside_it(tmp_path):
    path = tmp_path / "notes" / "note.json"
    texts = [str(number) * 1000 for number in range(4)]

    def write(text):
        for _ in range(300):
            write_text(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, texts))
    assert os.listdir(path.parent) == ["note.json"]


def test_a_file_has_the_permissions_of_other_new_files(tmp_path):
    write_text(tmp_path / "ours", "a")
    (tmp_path / "other").write_text("a")
    ours, other = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "other"))
    assert ours == other


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(OSError, match="full"), replacing(path) as partial:
        partial.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
