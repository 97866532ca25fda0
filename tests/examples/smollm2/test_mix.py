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


def test_rows_of_an_earlier_mixture_are_not_mixed_in(tmp_path):
    for kind in ("code", "glosses"):
        write_rows(tmp_path / "taught", kind, 3)
    mix(tmp_path / "taught", tmp_path / "short", {"code": 2, "glosses": 2}, True)
    with pytest.raises(ValueError, match=r"short has glosses\.jsonl, which this mixture does not contain: remove them"):
        mix(tmp_path / "taught", tmp_path / "short", {"code": 1}, True)
    assert mix(tmp_path / "taught", tmp_path / "short", {"code": 1, "glosses": 3}, True) == 4


def test_a_row_ends_at_its_line_break_alone(tmp_path):
    rows = [f'{{"query": "{number}\u2028a\x85b"}}\n' for number in range(3)]
    (tmp_path / "taught").mkdir()
    (tmp_path / "taught" / "code.jsonl").write_text("".join(rows), encoding="utf-8")
    assert mix(tmp_path / "taught", tmp_path / "long", {"code": 2}, False) == 2
    assert (tmp_path / "long" / "code.jsonl").read_text(encoding="utf-8") == "".join(rows[1:])


def test_the_kinds_are_those_that_are_collected():
    import collect

    assert set(SHORT) | set(LONG) == set(collect.KINDS)
