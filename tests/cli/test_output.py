import os

import pytest

from flagembedding_matryoshka.cli.output import StandardOutput


def test_where_nobody_reads_on_the_process_ends_without_a_fault():
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stdout:
        with pytest.raises(SystemExit) as ended:
            StandardOutput(stdout).append(["x"])
        assert ended.value.code == 1
