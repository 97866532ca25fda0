import pytest
from mix import LONG, SHORT, mix


def write_rows(folder, kind, count):
    folder.mkdir(exist_ok=True)
    (folder / f"{kind}.jsonl").write_text("".join(f"{number}\n" for number in range(count)))


def test_the_stages_take_the_first_and_the_last_rows(tmp_path, capsys):
    write_rows(tmp_path / "taught", "code", 10)
    counts = {"code": 4, "glosses": 3}
    assert mix(tmp_path / "taught", tmp_path / "short", counts, True) == 4
    assert mix(tmp_path / "taught", tmp_path / "long", counts, False) == 4
    assert (tmp_path / "short" / "code.jsonl").read_text().split() == ["0", "1", "2", "3"]
    assert (tmp_path / "long" / "code.jsonl").read_text().split() == ["6", "7", "8", "9"]
    assert "glosses: left out" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="none of glosses"):
        mix(tmp_path / "taught", tmp_path / "short", {"glosses": 3}, True)


def test_the_kinds_are_those_that_are_collected():
    import collect

    assert set(SHORT) | set(LONG) == set(collect.KINDS)
