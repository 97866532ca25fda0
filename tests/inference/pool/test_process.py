"""The worker's side of the pipe, run here: the order in which it starts tasks and waits for their scores."""

from multiprocessing import Pipe

import pytest

from flagembedding_matryoshka import MatryoshkaReranker
from flagembedding_matryoshka.inference import cascade, engine
from flagembedding_matryoshka.inference.engine import Engine, Task
from flagembedding_matryoshka.inference.pool.process import ParentConnection, TaskMessage, answer
from flagembedding_matryoshka.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def reranker(tiny_layerwise_path):
    return MatryoshkaReranker(str(tiny_layerwise_path), dtype="float32", devices="cpu")


def tasks_of(reranker, setting):
    for number, query in enumerate(("a wing", "the heat", "air")):
        pairs = reranker.tokenize([(query, text) for text in ("a", "heat flux", "a wing")])
        yield Task([pairs], [[0, 1, 2]], setting, [[number] * 3] if setting.cascade else None)


@pytest.mark.parametrize(
    ("setting", "module", "expected"),
    [
        (Setting(6), engine, "start start wait start wait wait"),
        (
            Setting(6, cascade={2: 0.5}),
            cascade,
            "start start wait start wait start wait start wait wait start wait",
        ),
    ],
    ids=["batches", "cascades"],
)
def test_a_task_that_is_there_is_started_before_the_scores_before_it_are_read(
    reranker, setting, module, expected, monkeypatch
):
    tasks, on_cpu = list(tasks_of(reranker, setting)), Engine(reranker.model)
    scored = [on_cpu.start(task)() for task in tasks]
    order, ours, theirs = [], *Pipe()
    parent, on_gpu = ParentConnection(theirs), Engine(reranker.model)
    monkeypatch.setattr(on_gpu, "_ahead", 1)
    monkeypatch.setattr(module, "copy_to_host", lambda values: order.append("start") or wait_for(values))

    def wait_for(values):
        return lambda: order.append("wait") or values

    for task in tasks:
        ours.send(TaskMessage(task, pauses=False))
    first = parent.receive()
    while parent._received.qsize() < 2:
        pass
    answer(parent, on_gpu, first)
    assert order == expected.split()
    assert [ours.recv().result for _ in tasks] == scored
    ours.close()
    with pytest.raises(EOFError):
        parent.receive()


def test_a_task_that_cannot_be_started_is_answered_in_its_turn(reranker):
    good, *_ = tasks_of(reranker, Setting(6))
    ours, theirs = Pipe()
    parent, own = ParentConnection(theirs), Engine(reranker.model)
    for task in (good, Task([[]], [[]], Setting(6)), good):
        ours.send(TaskMessage(task, pauses=False))
    found = []
    while len(found) < 3:
        answer(parent, own, parent.receive())
        while ours.poll():
            found.append(ours.recv())
    assert [type(one.error) for one in found] == [type(None), ValueError, type(None)]
    assert found[0].result == found[2].result == own.start(good)()
    ours.close()
