"""The same commands on a Ray cluster."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flagembedding_matryoshka.cli import commands, rank, score, work
from tests.cli.conftest import TEXTS

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a busy machine starts processes slowly

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


def found_by(workers, kind, desk, rows, **call):
    from flagembedding_matryoshka.cli.cluster import Cluster

    with Cluster(workers) as cluster:
        options = {"dtype": "float32", "devices": "cpu"}
        yield from commands.compute(kind, (desk.model, options, call), work.RowWindows(kind, rows), cluster)


def test_the_file_is_read_no_further_than_the_workers_need(ray_cluster, desk, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 1)
    read = []
    rows = (read.append(number) or row for number, row in enumerate(PAIRS * 10))
    found = found_by(1, score.Score, desk, rows)
    for place in range(3):
        window, results = next(found)
        assert window == (place, [PAIRS[place]]) and len(results) == 1 and len(read) <= place + 3
    found.close()


class Mortal(score.Score):
    """Its process ends within the window of passage 8, as often as a file has bytes."""

    def results(self, reranker, rows):
        lives = Path(self.call.pop("lives")) if "lives" in self.call else None
        if lives is not None and any(row["passage"].endswith(" 8") for row in rows) and (left := lives.read_bytes()):
            lives.write_bytes(left[1:])
            os._exit(1)
        found = super().results(reranker, rows)
        self.call |= {} if lives is None else {"lives": str(lives)}
        return found


def test_a_window_is_computed_again_where_a_worker_died(ray_cluster, desk, reranker, monkeypatch):
    monkeypatch.setattr(work, "PAIRS_PER_WINDOW", 4)
    lives = desk.source.with_name("lives")
    lives.write_bytes(b"1")
    windows = list(found_by(2, Mortal, desk, PAIRS[:20], lives=str(lives)))
    scores = reranker.compute_score([(row["query"], row["passage"]) for row in PAIRS[:20]])
    assert not lives.read_bytes() and [window.start for window, _ in windows] == [0, 4, 8, 12, 16]
    assert [score for _, results in windows for score in results] == pytest.approx(scores, abs=1e-5)

    monkeypatch.setattr("flagembedding_matryoshka.cli.cluster.DEATHS", 1)
    lives.write_bytes(b"1")
    found = found_by(1, Mortal, desk, PAIRS[:20], lives=str(lives))
    assert [next(found)[0].start, next(found)[0].start] == [0, 4]
    with pytest.raises(ConnectionError, match=r"1 workers of rows 9 to 12 .* The same command resumes"):
        list(found)


def test_workers_and_nodes_may_die(desk, tmp_path):
    """In a process of its own, because it makes nodes, and because Ray prints in a thread of the process.

    Two nodes with a worker each. First a worker dies, then one node and at last the other.
    """
    desk.write(PAIRS)
    lives = tmp_path / "lives"
    lives.write_bytes(b"1")
    code = f"""
        import json
        from ray.cluster_utils import Cluster as Nodes
        from flagembedding_matryoshka.cli import cluster, commands, score, work
        from tests.cli.test_cluster import PAIRS, Mortal
        nodes = Nodes(initialize_head=True, connect=True, head_node_args={{"num_cpus": 0}})
        workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
        nodes.wait_for_nodes()

        parser = score.build_parser()
        words = {desk.words("--ray", "1")!r}
        words[words.index({str(desk.output)!r})] = "-"
        commands.run(parser, Mortal, parser.parse_args(words), {{"lives": {str(lives)!r}}})

        cluster.SECONDS_FOR_A_WORKER, work.PAIRS_PER_WINDOW = 5.0, 4
        starts = []
        try:
            with cluster.Cluster(2) as found:
                arguments = {desk.model!r}, {{"dtype": "float32", "devices": "cpu"}}, {{}}
                for window, _ in commands.compute(score.Score, arguments, work.RowWindows(score.Score, PAIRS), found):
                    starts.append(window.start)
                    if window.start in (8, 32):
                        nodes.remove_node(workers.pop())
        except ConnectionError as error:
            print(json.dumps([starts, str(error)]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert ran.returncode == 0 and not lives.read_bytes(), ran.stderr
    printed = ran.stdout.splitlines()
    assert [json.loads(line)["id"] for line in printed[: len(PAIRS)]] == [row["id"] for row in PAIRS]
    assert "worker died" in ran.stderr  # Ray says so, and not between the lines
    starts, error = json.loads(next(line for line in printed if line.startswith("[[")))
    assert starts == list(range(0, 4 * len(starts), 4)) and 9 <= len(starts) < 15
    assert "started none within 5 s. The same command resumes after the last complete line of --output" in error
