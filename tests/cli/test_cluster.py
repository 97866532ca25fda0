"""The same commands on a Ray cluster."""

import pytest

from flagembedding_matryoshka.cli import commands, rank, score, work
from tests.cli.conftest import TEXTS

pytestmark = pytest.mark.slow

PAIRS = [{"id": number, "query": "wing", "passage": f"{TEXTS[number % 6]} {number}"} for number in range(60)]
LISTS = [{"query": "wing", "documents": [f"{text} {number}" for text in TEXTS]} for number in range(9)]


@pytest.mark.parametrize(("command", "rows"), [(score, PAIRS), (rank, LISTS)], ids=["score", "rank"])
def test_lines_are_those_of_one_process_in_their_order(command, rows, ray_cluster, desk, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 7)
    desk.write(rows)
    command.main(desk.words())
    alone, lines = desk.output.read_bytes(), desk.read()
    desk.output.write_bytes(alone[: len(alone) // 3])
    command.main(desk.words("--ray", "2"))
    for line, expected in zip(desk.read(), lines, strict=True):
        hits = [expected, *expected.get("ranking", ())]
        for hit in hits:
            hit |= {"score": pytest.approx(hit["score"], abs=1e-5)} if "score" in hit else {}
        assert line == expected


def test_first_stage_scores_reach_the_workers(ray_cluster, desk, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 7)
    desk.write([row | {"bm25": [3, None, 1.5, 7, 0, 2]} for row in LISTS])
    words = ("--first_stage_field", "bm25", "--fusion", "0.6")
    rank.main(desk.words(*words))
    lines = desk.read()
    desk.output.unlink()
    desk.output.with_name("out.jsonl.settings.json").unlink()
    rank.main(desk.words(*words, "--ray", "2"))
    for line, expected in zip(desk.read(), lines, strict=True):
        for hit, other in zip(line["ranking"], expected["ranking"], strict=True):
            assert hit == {name: pytest.approx(value, abs=1e-4) for name, value in other.items()}
            assert "fused_score" in hit


def test_what_a_worker_refuses_reaches_the_user(ray_cluster, desk):
    desk.write(PAIRS)
    with pytest.raises(ValueError, match=r"exits are \[2, 3, 4, 5, 6\]"):
        score.main(desk.words("--max_length", "64", "--prompt", "p", "--cutoff_layers", "99", "--ray", "1"))


def test_more_workers_than_there_is_room_for_are_refused(ray_cluster, desk):
    desk.write(PAIRS)
    with pytest.raises(ValueError, match="99 workers need a CPU each, and the Ray cluster has 4"):
        score.main(desk.words("--ray", "99"))


def test_the_file_is_read_no_further_than_the_workers_need(ray_cluster, desk, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 1)
    read = []
    rows = (read.append(number) or row for number, row in enumerate(PAIRS * 10))
    options = {"dtype": "float32", "devices": "cpu"}
    found = commands.compute(score.Score, (desk.model, options, {}), work.windows(score.Score, rows), 1)
    for place in range(3):
        window, results = next(found)
        assert window == (place, [PAIRS[place]]) and len(results) == 1 and len(read) <= place + 3
