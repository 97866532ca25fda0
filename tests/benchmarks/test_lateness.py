import time
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
from benchmarks import lateness
from flagembedding_matryoshka import MatryoshkaReranker

DELAY_MS = 20


@pytest.fixture
def slow(tiny_layerwise_path, monkeypatch):
    """A re-ranker that needs at least `DELAY_MS` for a call."""
    reranker = MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64)
    score_lists = reranker.score_lists

    def delayed(*lists, **options):
        time.sleep(DELAY_MS / 1000)
        return score_lists(*lists, **options)

    monkeypatch.setattr(reranker, "score_lists", delayed)
    return reranker


def test_32_clients_are_measured_by_their_own_clocks(slow, monkeypatch):
    monkeypatch.setattr(lateness, "full_batch_ms", lambda reranker: 0.25)  # no answer is in time
    report = lateness.measure(slow, 0.1)
    assert sum(row["clients"] for row in report["kinds"]) == 32
    assert all(row["requests"] >= row["clients"] for row in report["kinds"])
    hurried = [row for row in report["kinds"] if "deadline_ms" in row]
    assert [row["deadline_ms"] for row in hurried] == [1, 2, 4]
    for row in hurried:
        assert row["latency_ms"]["median"] >= DELAY_MS
        for name, late in row["lateness_ms"].items():
            assert late == pytest.approx(row["latency_ms"][name] - row["deadline_ms"], abs=0.2)
    assert report["lateness_ms"]["most"] == max(row["lateness_ms"]["most"] for row in hurried)
    assert report["steps"] > 0 and report["aim_ms"] == pytest.approx(100 + report["step_ms"]["p95"], abs=0.2)


def test_the_time_of_others_between_two_steps_is_no_time_of_a_step(tiny_layerwise_path, monkeypatch):
    reranker = MatryoshkaReranker(
        str(tiny_layerwise_path), dtype="float32", devices="cpu", max_length=64, max_tokens_per_batch=64
    )
    now = 0.0

    def others():
        nonlocal now
        now += 1000.0

    def clock():
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(lateness, "time", SimpleNamespace(perf_counter=clock))
    pairs = reranker.tokenize([("wing", f"air flows over the wing {number}") for number in range(20)])
    with lateness.timed_steps(reranker) as steps:
        reranker.score_lists([pairs], cascade={3: 0.5}, show_progress_bar=False, between_batches=others)
    assert len(steps) > 2 and max(steps) < 1000
