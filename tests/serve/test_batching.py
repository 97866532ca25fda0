import asyncio
import threading

from flagembedding_matryoshka.serve.batching import Batcher


class Doubler:
    """Doubles numbers, one call at a time, and remembers the calls; each waits until `open` is set. The key "steps" is
    computed number by number."""

    def __init__(self):
        self.calls = []
        self.threads = set()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, key, shares, between):
        self.threads.add(threading.current_thread().name)
        self.calls.append((key, [list(share) for share in shares]))
        self.open.wait(10)
        if key == "steps":
            for _item in shares[0]:
                between()
                self.calls.append("a step")
        if any("bad" in share for share in shares):
            raise ValueError("bad item")
        return [[2 * item for item in share] for share in shares]


def run(scenario, **limits):
    """Run `scenario(batcher, doubler)`; returns the calls that were made, and what the scenario returned."""
    doubler = Doubler()

    async def main():
        async with Batcher(doubler, **limits) as batcher:
            return await asyncio.wait_for(scenario(batcher, doubler), 10)

    returned = asyncio.run(main())
    assert len([name for name in doubler.threads if "between" not in name]) <= 1
    return doubler.calls, returned


async def while_busy(batcher, doubler, *jobs):
    """Tasks of `jobs`, (key, items) each, which arrive while the model computes something else."""
    doubler.open.clear()
    busy = asyncio.create_task(batcher.submit("busy", [0], 0, [1]))
    while not doubler.calls:
        await asyncio.sleep(0.001)
    tasks = []
    for key, items, *rest in jobs:
        divisible = rest[0] if rest else True
        tasks.append(asyncio.create_task(batcher.submit(key, items, 0, [1] * len(items), divisible)))
        await asyncio.sleep(0)
    return busy, tasks


def scenario_of(*jobs):
    async def scenario(batcher, doubler):
        busy, tasks = await while_busy(batcher, doubler, *jobs)
        doubler.open.set()
        return await asyncio.gather(*tasks, busy, return_exceptions=True)

    return scenario


def test_what_arrives_during_a_computation_is_one_batch():
    calls, results = run(scenario_of(("k", [1, 2]), ("k", [3]), ("k", [4])), max_tokens=10)
    assert calls[1:] == [("k", [[1, 2], [3], [4]])]
    assert results == [[2, 4], [6], [8], [0]]


def test_a_free_model_starts_at_once():
    async def scenario(batcher, doubler):
        return await batcher.submit("k", [1], 0, [1]), await batcher.submit("k", [], 0, [])

    assert run(scenario, max_tokens=10) == ([("k", [[1]])], ([2], []))


def test_different_keys_are_computed_apart_the_oldest_first():
    calls, results = run(scenario_of(("a", [1]), ("b", [2]), ("a", [3]), ("b", [4])), max_tokens=10)
    assert calls[1:] == [("a", [[1], [3]]), ("b", [[2], [4]])]
    assert results == [[2], [4], [6], [8], [0]]


def test_a_batch_holds_so_many_tokens():
    calls, _ = run(scenario_of(("k", [1, 2]), ("k", [3, 4]), ("k", [5])), max_tokens=3)
    assert calls[1:] == [("k", [[1, 2], [3]]), ("k", [[4], [5]])]


def test_tokens_that_a_task_shares_count_once_in_a_batch():
    async def scenario(batcher, doubler):
        return await batcher.submit("k", [1, 2, 3], 2, [1, 2, 3])

    calls, _ = run(scenario, max_tokens=5)
    assert calls == [("k", [[1, 2]]), ("k", [[3]])]


def test_an_item_larger_than_a_batch_is_computed_alone():
    async def scenario(batcher, doubler):
        return await batcher.submit("k", [1, 2], 0, [100, 1])

    assert run(scenario, max_tokens=5) == ([("k", [[1]]), ("k", [[2]])], [2, 4])


def test_at_most_so_many_tasks_in_a_batch():
    calls, _ = run(scenario_of(("k", [1]), ("k", [2]), ("k", [3])), max_tokens=10, max_tasks=1)
    assert calls[1:] == [("k", [[1]]), ("k", [[2]]), ("k", [[3]])]


def test_a_large_task_lets_the_small_ones_behind_it_through():
    calls, results = run(scenario_of(("k", [*range(1, 8)]), ("k", [8]), ("other", [9])), max_tokens=3)
    assert calls[1:] == [
        ("k", [[1, 2, 3]]),
        ("k", [[8], [4, 5]]),
        ("other", [[9]]),
        ("k", [[6, 7]]),
    ]
    assert results[0] == [2, 4, 6, 8, 10, 12, 14]


def test_small_tasks_that_keep_coming_do_not_starve_a_large_one():
    async def scenario(batcher, doubler):
        large = asyncio.create_task(batcher.submit("large", list(range(20)), 0, [1] * 20))

        async def client():
            for count in range(100):
                if large.done():
                    return count
                await batcher.submit("small", [1], 0, [1])
            return None

        counts = await asyncio.gather(client(), client())
        return await large, counts

    _, (results, counts) = run(scenario, max_tokens=4)
    assert results == [2 * item for item in range(20)]
    assert None not in counts


def test_what_must_not_be_divided_is_not():
    calls, _ = run(scenario_of(("k", [1, 2], False), ("k", [3, 4, 5, 6], False), ("k", [7], False)), max_tokens=3)
    assert calls[1:] == [("k", [[1, 2]]), ("k", [[3, 4, 5, 6]]), ("k", [[7]])]


def test_an_error_concerns_the_tasks_it_belongs_to():
    calls, results = run(scenario_of(("k", [1]), ("k", ["bad"]), ("k", [3])), max_tokens=10)
    assert results[0] == [2] and results[2] == [6]
    assert isinstance(results[1], ValueError)
    assert calls[1:] == [("k", [[1], ["bad"], [3]]), ("k", [[1]]), ("k", [["bad"]]), ("k", [[3]])]


def test_the_batcher_knows_whether_the_last_computation_failed():
    async def scenario(batcher, doubler):
        seen = [batcher.failing]
        for item in ("bad", 1):
            await asyncio.gather(batcher.submit("k", [item], 0, [1]), return_exceptions=True)
            seen.append(batcher.failing)
        return seen

    assert run(scenario, max_tokens=10)[1] == [False, True, False]


def test_a_cancelled_task_is_not_computed():
    async def scenario(batcher, doubler):
        _, tasks = await while_busy(batcher, doubler, ("k", [1]), ("k", [2]))
        assert batcher.waiting == 3
        tasks[0].cancel()
        await asyncio.sleep(0)
        doubler.open.set()
        return await tasks[1]

    calls, result = run(scenario, max_tokens=10)
    assert calls[1:] == [("k", [[2]])]
    assert result == [4]


def test_a_task_cancelled_while_it_is_computed_harms_nobody():
    async def scenario(batcher, doubler):
        busy, tasks = await while_busy(batcher, doubler, ("k", [1]))
        busy.cancel()
        await asyncio.sleep(0)
        doubler.open.set()
        return await tasks[0]

    assert run(scenario, max_tokens=10)[1] == [2]


def test_leaving_cancels_what_waits():
    doubler = Doubler()

    async def main():
        async with Batcher(doubler, 10) as batcher:
            busy, tasks = await while_busy(batcher, doubler, ("k", [1]))
            doubler.open.set()
        return await asyncio.gather(busy, *tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[1], asyncio.CancelledError)
    assert len(doubler.calls) == 1


def test_every_computation_is_reported():
    reports = []
    run(scenario_of(("k", [1, 2]), ("k", [3])), max_tokens=10, report=reports.append)
    assert [(report.requests, report.items, report.tokens) for report in reports] == [(1, 1, 1), (2, 3, 3)]


def test_between_the_steps_of_what_must_not_be_divided_others_are_computed():
    calls, results = run(
        scenario_of(("steps", [1, 2, 3], False), ("k", [4, 5, 6, 7]), ("steps", [8], False), ("k", ["bad"])),
        max_tokens=3,
    )
    assert results[0] == [2, 4, 6] and results[1] == [8, 10, 12, 14] and results[2] == [16]
    assert isinstance(results[3], ValueError)
    assert calls[1:] == [
        ("steps", [[1, 2, 3]]),
        ("k", [[4, 5, 6]]),
        "a step",
        ("k", [["bad"], [7]]),
        ("k", [["bad"]]),
        ("k", [[7]]),
        "a step",
        "a step",
        ("steps", [[8]]),
        "a step",
    ]


def test_steps_that_nobody_waits_for_are_not_made():
    async def scenario(batcher, doubler):
        doubler.open.clear()
        gone = asyncio.create_task(batcher.submit("steps", [1, 2, 3], 0, [1] * 3, divisible=False))
        while not doubler.calls:
            await asyncio.sleep(0.001)
        other = asyncio.create_task(batcher.submit("k", [4], 0, [1]))
        gone.cancel()
        await asyncio.sleep(0)
        doubler.open.set()
        return await other, batcher.failing

    calls, result = run(scenario, max_tokens=3)
    assert calls == [("steps", [[1, 2, 3]]), ("k", [[4]])]
    assert result == ([8], False)
