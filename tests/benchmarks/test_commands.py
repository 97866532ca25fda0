"""The benchmark of commands by the number of passages."""

import json

import pytest

from benchmarks.commands import COMMANDS, main


@pytest.mark.slow
def test_every_command_is_measured_on_a_collection_of_each_size(tmp_path):
    output = tmp_path / "commands.json"
    main(["--passages", "1000", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["passages"] == 1000
    for name in COMMANDS:
        assert row[name]["GB"] > 0 and row[name]["CPU s"] > 0
