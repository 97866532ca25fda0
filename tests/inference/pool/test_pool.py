import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest
import torch

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference.engine import Engine, Task
from flagembedding_matryoshka.inference.pool.pool import SHARED_MEMORY, TASKS_AHEAD
from flagembedding_matryoshka.inference.pool.worker import Worker
from flagembedding_matryoshka.setting import Setting
from tests.batches import ImmediateExecutor

QUERIES = ["how does a wing lift", "heat flux at a blunt nose"]
PASSAGES = ["", "a wing", "heat flux", "air flows over a wing. " * 6, "the flow of energy", "a blunt cone"]

PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]


def load(path, devices="cpu", **options):
    return MatryoshkaReranker(str(path), dtype="float32", devices=devices, max_length=64, **options)


@pytest.fixture(scope="module")
def one(tiny_layerwise_path):
    return load(tiny_layerwise_path)


@pytest.fixture(scope="module")
def two(tiny_layerwise_path):
    with load(tiny_layerwise_path, ["cpu", "cpu"]) as reranker:
        yield reranker


def score_until_all_are_ready(reranker):
    assert eventually(lambda: reranker.compute_score(PAIRS) and all(w.ready for w in reranker._engine._workers), 60)


def processes(reranker):
    return [worker.process for worker in reranker._engine._workers]


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)


def gone(pid):
    """Whether no such process runs, or it is only waiting to be reaped."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("cutoffs", [[2], [6, 2, 4]])
@pytest.mark.parametrize("count", [0, 1, 3, len(PAIRS)])
def test_several_devices_score_as_one(one, two, cutoffs, count):
    for width in ({}, {"compress_layers": [2], "compress_ratio": 2}):
        close(
            two.compute_score(PAIRS[:count], cutoff_layers=cutoffs, **width),
            one.compute_score(PAIRS[:count], cutoff_layers=cutoffs, **width),
        )


def test_a_cascade_runs_on_several_devices(one, two):
    arguments = {"cascade": {2: 0.5, 4: 0.3}, "top_k": 1, "normalize": True}
    found = [reranker.rank_batch(QUERIES, [PASSAGES] * len(QUERIES), **arguments) for reranker in (one, two)]
    for alone, shared in zip(*found, strict=True):
        assert [hit["corpus_id"] for hit in alone] == [hit["corpus_id"] for hit in shared]
        close([hit["score"] for hit in shared], [hit["score"] for hit in alone])


@pytest.mark.parametrize(("deadline_ms", "exit"), [(0.001, 2), (math.inf, 6)])
def test_each_query_has_its_deadline_on_one_of_several_devices(two, deadline_ms, exit):
    queries, candidates = ["what about the wing", "shock"], [[passage for _, passage in PAIRS[:5]], ["heat", "wing"]]
    rankings = two.rank_batch(queries, candidates, deadline_ms=deadline_ms)
    assert [{hit["cutoff_layer"] for hit in hits} for hits in rankings] == [{exit}, {exit}]
    assert list(map(len, rankings)) == [5, 2]


@pytest.mark.parametrize("cascade", [None, {2: 0.5}])
def test_rankings_come_one_by_one_and_the_workers_are_free_in_between(one, two, cascade, monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.inference.scoring.PAIRS_TOKENIZED_AHEAD", 8)
    lists = [(query, PASSAGES) for query in QUERIES * 2]
    found = []
    for ranking in two.rank_iter(lists, cascade=cascade):
        found.append(ranking)
        two.compute_score(PAIRS[:2])
    for ranking, expected in zip(found, one.rank_iter(lists, cascade=cascade), strict=True):
        assert [hit["corpus_id"] for hit in ranking] == [hit["corpus_id"] for hit in expected]
        close([hit["score"] for hit in ranking], [hit["score"] for hit in expected])


def test_a_run_outlives_its_windows_unless_rankings_are_taken_one_by_one(one, two, monkeypatch):
    for name in ("PAIRS_TOKENIZED_FIRST", "PAIRS_TOKENIZED_AHEAD"):
        monkeypatch.setattr(f"flagembedding_matryoshka.inference.scoring.{name}", len(PASSAGES))
    monkeypatch.setattr("flagembedding_matryoshka.inference.scoring.ThreadPoolExecutor", ImmediateExecutor)
    runs, run = [], two._engine.run
    monkeypatch.setattr(two._engine, "run", lambda tasks, **options: runs.append(1) or run(tasks, **options))
    lists, options = (QUERIES * 2, [PASSAGES] * 4), {"cascade": {2: 0.5}}
    together = two.rank_batch(*lists, **options)
    assert len(runs) == 1
    one_by_one = list(two.rank_iter(*lists, **options))
    assert len(runs) >= 1 + 4
    for rankings in (together, one_by_one):
        for ranking, expected in zip(rankings, one.rank_batch(*lists, **options), strict=True):
            assert [hit["corpus_id"] for hit in ranking] == [hit["corpus_id"] for hit in expected]
            close([hit["score"] for hit in ranking], [hit["score"] for hit in expected])


def test_work_is_shared_by_tokens(two, monkeypatch):
    batches = []
    run = two._engine.run
    monkeypatch.setattr(two._engine, "run", lambda tasks, device: run(map(noted, tasks), device))

    def noted(task):
        batches.append(sum(len(pair) for pair in task.batches[0]))
        return task

    two.compute_score(PAIRS)
    assert len(batches) >= 2
    assert max(batches) <= 0.75 * sum(batches)


def test_one_device_of_several(one, two):
    close(two.compute_score_single_gpu(PAIRS, device="cpu"), one.compute_score(PAIRS))
    with pytest.raises(ValueError, match="'cuda:7' is not one of"):
        two.compute_score_single_gpu(PAIRS, device="cuda:7")


def test_weights_are_shared(two):
    two.compute_score(PAIRS)
    assert all(parameter.is_shared() for parameter in two.model.parameters())


@pytest.mark.slow
def test_workers_stay_between_calls_and_close_ends_them(one, two, monkeypatch):
    monkeypatch.setattr("flagembedding_matryoshka.inference.pool.worker.SECONDS_TO_LEAVE", 120.0)  # on a busy machine
    score_until_all_are_ready(two)
    before = processes(two)
    two.compute_score(PAIRS)
    assert processes(two) == before and len(before) == 2
    two.close()
    assert [process.exitcode for process in before] == [0, 0]
    close(two.compute_score(PAIRS), one.compute_score(PAIRS))
    assert not set(processes(two)) & set(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.slow
def test_a_forked_child_starts_workers_of_its_own(one, two):
    score_until_all_are_ready(two)
    before = [process.pid for process in processes(two)]
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        inherited = multiprocessing.active_children()
        torch.set_num_threads(1)
        found = two.compute_score(PAIRS[:5])
        theirs.send((len(inherited), found, [process.pid for process in processes(two)]))
        two.close()
        os._exit(0)
    try:
        for _ in range(20):  # the child's answers would be among these
            close(two.compute_score(PAIRS), one.compute_score(PAIRS))
        assert ours.poll(120)
        inherited, found, workers = ours.recv()
        os.waitpid(child, 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert inherited == 0 and not set(workers) & set(before)
    close(found, one.compute_score(PAIRS[:5]))
    assert [process.pid for process in processes(two)] == before and all(
        process.is_alive() for process in processes(two)
    )


def test_the_pool_of_flagembedding_is_refused_with_what_to_do(one):
    with pytest.raises(NotImplementedError, match="starts its worker processes itself"):
        one.start_multi_process_pool()


def test_threads_take_turns(one, two):
    expected = one.compute_score(PAIRS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: two.compute_score(PAIRS), range(8)):
            close(found, expected)


def test_what_a_worker_raises_arrives_with_its_traceback(two):
    two.compute_score(PAIRS)
    with (
        closing(two._engine.run(iter([Task([[]], [[]], None)]))) as results,
        pytest.raises(ValueError, match="non-empty") as raised,
    ):
        list(results)
    assert "in the worker of cpu" in str(raised.value.__cause__)
    assert "engine.py" in str(raised.value.__cause__)


def test_workers_outlive_a_bad_task_and_what_they_owe_from_its_call_is_thrown_away(one, two):
    score_until_all_are_ready(two)
    before = processes(two)
    good = Engine(one.model), Task([one_pair(one)], [[0]], Setting(6))
    expected = good[0].start(good[1])().scores
    for place in range(3):
        tasks = [good[1]] * 4
        tasks[place] = Task([[]], [[]], None)
        with closing(two._engine.run(iter(tasks))) as results, pytest.raises(ValueError, match="non-empty"):
            list(results)
        found = list(two._engine.run(iter([good[1]] * 5)))
        assert len(found) == 5
        for _, scored in found:
            close(scored.scores, expected)
    close(two.compute_score(PAIRS), one.compute_score(PAIRS))
    assert processes(two) == before and all(process.is_alive() for process in before)


def one_pair(reranker):
    return reranker._pair_tokenizer.build([("a wing", "lift")], 20, 20, 60)


def test_a_daemonic_process_is_told_that_it_may_have_no_workers(tiny_layerwise_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    message = r"several devices, \['cpu', 'cpu'\], take a process each, .*daemonic"
    with load(tiny_layerwise_path, ["cpu", "cpu"]) as reranker, pytest.raises(RuntimeError, match=message):
        reranker.compute_score(PAIRS)


def test_a_killed_worker_is_noticed_and_the_other_does_its_work(one, two, caplog):
    score_until_all_are_ready(two)
    victim = processes(two)[0]
    os.kill(victim.pid, signal.SIGSTOP)  # so that it dies with a batch in its hands
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(two.compute_score, PAIRS, batch_size=4)
        time.sleep(0.5)
        assert not found.done()
        victim.kill()
        close(found.result(timeout=30), one.compute_score(PAIRS))
    assert "that of cpu, which died with exit code -9" in caplog.text
    two.compute_score(PAIRS)
    assert len(processes(two)) == 2, "a new one has taken its place"


@pytest.fixture
def two_with_room(two, monkeypatch):
    """Workers on CPUs that are given tasks ahead, as those on GPUs are."""
    score_until_all_are_ready(two)
    for worker in two._engine._workers:
        monkeypatch.setattr(worker, "room", TASKS_AHEAD)
    return two


def test_a_worker_with_room_has_tasks_ahead_and_scores_are_the_same(one, two_with_room, monkeypatch):
    held = []

    def noting(method):
        def give(worker, *given, **options):
            method(worker, *given, **options)
            held.append(len(worker.assignments) + len(worker.ahead))

        return give

    monkeypatch.setattr(Worker, "give", noting(Worker.give))
    monkeypatch.setattr(Worker, "give_ahead", noting(Worker.give_ahead))
    close(two_with_room.compute_score(PAIRS, batch_size=1), one.compute_score(PAIRS))
    assert held[:6] == [1, 1, 2, 2, 3, 3] and max(held) == 3 and len(held) == len(PAIRS)
    found = two_with_room.rank_batch(QUERIES * 3, [PASSAGES] * 6, **CASCADE)
    for hits, alone in zip(found, one.rank_batch(QUERIES * 3, [PASSAGES] * 6, **CASCADE), strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in alone]
        close([hit["score"] for hit in hits], [hit["score"] for hit in alone])
    held.clear()
    two_with_room.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE, between_batches=lambda: None)
    assert set(held) == {1}  # between its batches a worker is free for others


def test_tasks_ahead_of_a_run_that_fails_are_dropped(one, two_with_room):
    before = processes(two_with_room)
    good = Task([one_pair(one)], [[0]], Setting(6))
    with (
        closing(two_with_room._engine.run(iter([good, Task([[]], [[]], None), *[good] * 4]))) as results,
        pytest.raises(ValueError, match="non-empty"),
    ):
        list(results)
    close(two_with_room.compute_score(PAIRS), one.compute_score(PAIRS))
    assert processes(two_with_room) == before


@pytest.mark.slow
def test_tasks_ahead_of_a_killed_worker_go_to_the_other(one, two_with_room):
    victim = processes(two_with_room)[0]
    os.kill(victim.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(two_with_room.compute_score, PAIRS, batch_size=1)
        assert eventually(lambda: len(two_with_room._engine._workers[0].ahead) == TASKS_AHEAD)
        victim.kill()
        close(found.result(timeout=30), one.compute_score(PAIRS))


@pytest.mark.slow
def test_if_all_workers_die_the_caller_hears_it(one, two):
    score_until_all_are_ready(two)
    for process in processes(two):
        os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(two.compute_score, PAIRS)
        time.sleep(0.5)
        for process in processes(two):
            process.kill()
        with pytest.raises(RuntimeError, match=r"(killed two workers|no worker is left).*exit code -9"):
            found.result(timeout=30)
    close(two.compute_score(PAIRS), one.compute_score(PAIRS))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes as Linux does")
def test_workers_never_receive_ctrl_c_and_this_process_still_does(two):
    two.compute_score(PAIRS)
    for status in [Path(f"/proc/{process.pid}/status").read_text() for process in processes(two)]:
        (blocked,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk:")]
        assert blocked >> signal.SIGINT - 1 & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupted_call_stops_the_workers_at_once(one, two):
    score_until_all_are_ready(two)
    stopped = processes(two)
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            two.compute_score(PAIRS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(process.is_alive() for process in stopped)
    close(two.compute_score(PAIRS), one.compute_score(PAIRS))


CASCADE = {"cascade": {2: 0.5, 4: 0.3}}


def test_between_a_cascades_batches_others_are_computed(one, two):
    expected = one.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE), one.compute_score(PAIRS)
    scores, ranked = [], []
    with ThreadPoolExecutor(1) as pool:

        def others():
            if threading.current_thread() is threading.main_thread():  # else it is between those of the other cascade
                scores.append(pool.submit(two.compute_score, PAIRS).result(60))
                ranked.append(pool.submit(two.rank_batch, QUERIES, [PASSAGES] * 2, **CASCADE).result(60))

        found = two.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE, batch_size=2, between_batches=others)
    assert len(scores) >= 6
    for ranking in (found, *ranked):
        for hits, alone in zip(ranking, expected[0], strict=True):
            assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in alone]
            close([hit["score"] for hit in hits], [hit["score"] for hit in alone])
    for values in scores:
        close(values, expected[1])


def test_what_is_raised_between_batches_ends_a_cascade_and_no_worker(one, two):
    score_until_all_are_ready(two)
    before, calls = processes(two), []

    def enough():
        calls.append(1)
        if len(calls) % 3 == 0:
            raise InterruptedError("nobody waits")

    for count in (3, 6):
        with pytest.raises(InterruptedError, match="nobody waits"):
            two.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE, batch_size=1, between_batches=enough)
        assert len(calls) == count
        close(two.compute_score(PAIRS), one.compute_score(PAIRS))
    assert processes(two) == before and all(process.is_alive() for process in before)
    assert not any(worker.assignments for worker in two._engine._workers)


@pytest.mark.slow
def test_a_worker_that_dies_between_batches_is_replaced_for_all(one, two):
    score_until_all_are_ready(two)
    scores = []
    with ThreadPoolExecutor(1) as pool:

        def others():
            if not scores:
                paused = next(worker for worker in two._engine._workers if worker.is_paused)
                paused.process.kill()
            scores.append(pool.submit(two.compute_score, PAIRS).result(60))

        found = two.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE, between_batches=others)
    for hits, alone in zip(found, one.rank_batch(QUERIES, [PASSAGES] * 2, **CASCADE), strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in alone]
    for values in scores:
        close(values, one.compute_score(PAIRS))


@pytest.mark.slow
def test_a_pause_that_another_call_hears_of_is_not_waited_for(one, two):
    """The first worker pauses while the callback runs for the second, and somebody else's call hears of it."""
    score_until_all_are_ready(two)
    lists = [PASSAGES * 10, PASSAGES[:2]]
    heard = []
    with ThreadPoolExecutor(1) as pool:

        def others():
            if heard:
                return
            first, second = two._engine._workers
            if second.is_paused and not first.is_paused:
                assert first.connection.poll(60)
                second.process.kill()
                pool.submit(two.compute_score, PAIRS).result(60)
                heard.append(first.is_paused)

        found = two.rank_batch(QUERIES, lists, **CASCADE, between_batches=others)
    assert heard == [True]
    for hits, alone in zip(found, one.rank_batch(QUERIES, lists, **CASCADE), strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in alone]


@pytest.mark.slow
def test_too_little_shared_memory_is_said(tiny_layerwise_path, monkeypatch):
    if not SHARED_MEMORY.exists():
        pytest.skip(f"no {SHARED_MEMORY} here")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with load(tiny_layerwise_path, ["cpu", "cpu"]) as reranker, pytest.raises(RuntimeError, match="--shm-size"):
        reranker.compute_score(PAIRS)


SCRIPT = """
import json, os, sys, time
from flagembedding_matryoshka import MatryoshkaReranker

if __name__ == "__main__":
    reranker = MatryoshkaReranker(sys.argv[1], devices=["cpu", "cpu"])
    reranker.compute_score([("a query", "a passage")] * 4)
    print(json.dumps([worker.process.pid for worker in reranker._engine._workers]), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["by itself", "killed"])
def test_no_worker_outlives_its_parent(tiny_layerwise_path, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tiny_layerwise_path), "wait" if end == "killed" else "leave"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        workers = json.loads(parent.stdout.readline())
        assert len(workers) == 2
        if end == "killed":
            parent.kill()
        assert parent.wait(30) == (-9 if end == "killed" else 0)
        assert "Error" not in parent.stderr.read()
    assert eventually(lambda: all(map(gone, workers)))
