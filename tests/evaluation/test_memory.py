import sys

import psutil
import pytest

from flagembedding_matryoshka.evaluation.memory import peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark")
def test_what_was_freed_again_counts():
    before = psutil.Process().memory_info().rss
    size = 256 * 2**20
    peak = peak_memory(lambda: bytearray(b"\x01") * size, ["cpu"])
    assert peak == pytest.approx(before + size, rel=0.1)


def test_workers_are_processes_of_their_own():
    done = []
    assert peak_memory(lambda: done.append(True), ["cpu", "cpu"]) is None
    assert done
