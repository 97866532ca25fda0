import json
import os
import shutil

import pytest

from flagembedding_matryoshka.cli import work
from flagembedding_matryoshka.cli.score import Score, main
from tests.cli.conftest import TEXTS

PAIRS = [{"id": f"ü{number}", "query": "wing", "passage": f"{text} {number}"} for number, text in enumerate(TEXTS * 2)]


def scores_of(reranker, rows, **options):
    return reranker.compute_score([(row["query"], row["passage"]) for row in rows], **options)


def test_lines_have_what_compute_score_returns_to_the_last_bit(desk, reranker):
    rows = desk.write(PAIRS)
    main(desk.words("--cutoff_layers", "4", "--compress_layers", "2", "--compress_ratio", "2", "--normalize"))
    expected = scores_of(reranker, rows, cutoff_layers=4, compress_layers=2, compress_ratio=2, normalize=True)
    assert desk.read() == [row | {"score": score} for row, score in zip(rows, expected, strict=True)]


def test_several_exits_give_a_list_for_each_pair(desk, reranker):
    rows = desk.write(PAIRS)
    main(desk.words("--cutoff_layers", "5", "3"))
    expected = zip(*scores_of(reranker, rows, cutoff_layers=[5, 3]), strict=True)
    assert [row["score"] for row in desk.read()] == [list(scores) for scores in expected]


def test_any_form_in_windows_of_any_size_to_standard_output(desk, reranker, monkeypatch, capsysbinary):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 5)
    desk.source = desk.source.with_name("rows.tsv")
    desk.source.write_text("".join(f"{row['query']}\t{row['passage']}\n" for row in PAIRS))
    words = desk.words()
    words.remove("--output")
    words.remove(str(desk.output))
    main(words)
    rows = [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]
    assert [row.pop("score") for row in rows] == pytest.approx(scores_of(reranker, PAIRS), abs=1e-5)
    assert rows == [{"query": row["query"], "passage": row["passage"]} for row in PAIRS]


def test_a_pipe_is_read_from_its_start_and_no_further_than_is_needed(monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 3)
    read = []
    rows = (read.append(number) or {"query": "q", "passage": "p"} for number in range(1000))
    windows = work.RowWindows(Score, rows)
    assert len(next(windows).rows) == 3 and read == [0, 1, 2]
    assert next(windows).start == 3


def sizes(pairs_per_second):
    """Pairs of the windows of 20,000 rows, where they are computed at this rate."""
    windows = work.RowWindows(Score, ({"query": "q", "passage": "p"} for _ in range(20_000)))
    for window in windows:
        windows.adapt(window, len(window.rows) / pairs_per_second)
        yield len(window.rows)


def test_windows_end_by_time():
    fast, slow, slowest = (list(sizes(rate)) for rate in (1000, 10, 0.01))
    assert fast[:6] == [128, 256, 512, 1024, 2048, 4096] and set(fast[6:-1]) == {4096}
    assert slow[0] == slow[1] == 128 and max(slow) / 10 <= work.SECONDS_PER_WINDOW
    assert slowest[:3] == [128, 1, 1]
    assert sum(fast) == sum(slow) == sum(slowest) == 20_000


@pytest.fixture
def standard_input():
    """Writes what the process then reads there."""
    before = os.dup(0)

    def write(data):
        reads, writes = os.pipe()
        os.write(writes, data)
        os.close(writes)
        os.dup2(reads, 0)
        os.close(reads)

    yield write
    os.dup2(before, 0)
    os.close(before)


def test_standard_input_is_a_file(desk, reranker, standard_input):
    standard_input("".join(json.dumps([row["query"], row["passage"]]) + "\n" for row in PAIRS).encode("utf-16"))
    words = desk.words()
    words[words.index(str(desk.source))] = "-"
    main(words)
    assert [row["score"] for row in desk.read()] == scores_of(reranker, PAIRS)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_an_output_that_was_cut_off_is_completed(share, desk, reranker, monkeypatch):
    desk.write(PAIRS)
    main(desk.words())
    whole, lines = desk.output.read_bytes(), desk.read()
    kept = whole[: int(share * len(whole))]
    desk.output.write_bytes(kept)
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 3)
    main(desk.words("--batch_size", "2"))
    assert desk.output.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    again = desk.read()
    assert [row.pop("score") for row in again] == pytest.approx([row.pop("score") for row in lines], abs=1e-5)
    assert again == lines


def test_where_all_is_done_nothing_is_loaded(desk, monkeypatch):
    desk.write(PAIRS)
    main(desk.words())
    before = desk.output.read_bytes()
    monkeypatch.setattr(work, "MatryoshkaReranker", None)
    main(desk.words())
    assert desk.output.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([*PAIRS[:3], PAIRS[4]], "line 4 is not of row 4 of the input"),
        (PAIRS[:3], "has more lines than the input has rows"),
        ([PAIRS[0] | {"id": "other"}, *PAIRS[1:]], "line 1 is not of row 1"),
    ],
)
def test_an_output_of_another_input_is_not_continued(rows, fault, desk):
    desk.write(PAIRS[:5])
    main(desk.words())
    before = desk.output.read_bytes()
    desk.write(rows)
    with pytest.raises(ValueError, match=rf"out\.jsonl.* {fault}"):
        main(desk.words())
    assert desk.output.read_bytes() == before


def test_other_settings_are_refused(desk):
    desk.write(PAIRS)
    main(desk.words())
    with pytest.raises(ValueError, match="cutoff_layers was None and is"):
        main(desk.words("--cutoff_layers", "3"))


def test_other_weights_and_another_dtype_are_refused(desk, tmp_path):
    desk.model = str(shutil.copytree(desk.model, tmp_path / "model"))
    desk.write(PAIRS)
    main(desk.words())
    noted = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert noted["resolved_dtype"] == "float32" and len(noted["weights"]) == 64
    with pytest.raises(ValueError, match="dtype was 'float32' and is 'bfloat16'"):
        main(desk.words("--dtype", "bfloat16"))
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"written with other settings, .* weights was '\w+' and is '\w+'"):
        main(desk.words())


def test_settings_of_an_older_version_name_no_weights_and_are_continued_with_a_warning(desk, tmp_path):
    desk.write(PAIRS)
    main(desk.words())
    before = desk.output.read_bytes()
    beside = tmp_path / "out.jsonl.settings.json"
    noted = json.loads(beside.read_text())
    beside.write_text(json.dumps({name: noted[name] for name in noted if name not in ("weights", "resolved_dtype")}))
    desk.output.write_bytes(before[:300])
    with pytest.warns(UserWarning, match=r"out.jsonl.settings.json names no weights"):
        main(desk.words())
    assert len(desk.read()) == len(PAIRS)


def test_a_row_that_has_a_score_is_refused(desk):
    desk.write([["wing", "air"], {"query": "wing", "passage": "air", "score": 3}])
    with pytest.raises(ValueError, match="line 2: the row has a field 'score', the name of the result: rename it"):
        main(desk.words())


def test_a_bad_line_of_a_file_is_named_before_anything_is_computed(desk):
    desk.write([*PAIRS, {"query": "wing"}])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 13: a row must have either passage or document"):
        main(desk.words())
    assert not desk.output.exists()


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--ray", "-1"], "--ray -1: the number of workers must be at least 0"),
        (["--output", "rows.jsonl"], "is the input"),
    ],
)
def test_what_cannot_be_asked_for(more, fault, desk, monkeypatch, capsys):
    desk.write(PAIRS)
    monkeypatch.chdir(desk.source.parent)
    with pytest.raises(SystemExit):
        main(desk.words(*more))
    assert fault in capsys.readouterr().err
