import json
import math

from benchmarks import deadlines
from tests.collection import write_collection


def test_each_way_ranks_every_query(tiny_layerwise_path, tmp_path, one_thread, capsys):
    data, output = write_collection(tmp_path / "beir"), tmp_path / "deadlines.json"
    given = [
        "--model",
        tiny_layerwise_path,
        "--data",
        data,
        "--split",
        "train",
        "--dtype",
        "float32",
        "--output",
        output,
    ]
    deadlines.main(list(map(str, given)))
    printed = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report == json.loads(printed.splitlines()[-1])
    assert report["queries"] == 1
    fixed, (cascade,), limited = report["ways"][:5], report["ways"][5:6], report["ways"][6:]
    assert [row["cutoff_layers"] for row in fixed] == [2, 3, 4, 5, 6]
    assert all(row["exit_of_first_ten"] == row["exit_of_all"] == row["cutoff_layers"] for row in fixed)
    assert cascade["cascade"] == {"2": deadlines.CASCADE_SHARE} and 2 < cascade["exit_of_all"] < 6
    assert len(limited) == len(deadlines.SHARES) and printed.count("| in ") == len(limited)
    for row in limited:
        assert 2 <= row["exit_of_all"] <= row["exit_of_first_ten"] <= 6
        assert 0 <= row["late_milliseconds"] < math.inf and 0 <= row["nDCG@10"] <= 1
