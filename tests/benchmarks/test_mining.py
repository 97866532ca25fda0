import json

from benchmarks.mining import main


def test_every_retriever_is_measured(capsys, tmp_path):
    main(["--passages", "300", "--queries", "5", "--output", str(tmp_path / "mining.json")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "mining.json").read_text())
    (row,) = report["rows"]
    assert row["passages"] == 300 and row["recall of the index"] > 0.9
    assert {name for name in row if name.endswith(" s")} == {
        *("BM25 index s", "BM25 search s", "BM25 pairs s", "exact search s", "index s", "index search s")
    }
