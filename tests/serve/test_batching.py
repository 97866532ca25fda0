import asyncio
import threading

from flagembedding_matryoshka.serve.batching import MAX_INTERRUPTED, Batcher


class Doubler:
    """Doubles numbers, one call at a time, and remembers the calls; each waits until `open` is set. A key that begins
    with "steps" is computed number by number."""

    def __init__(self):
        self.calls = []
        self.threads = set()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, key, shares, between):
        self.threads.add(threading.current_thread().name)
        self.calls.append((key, [list(share) for share in shares]))
        self.open.wait(10)
        if key.startswith("steps"):
            for _item in shares[0]:
                between()
                self.calls.append(f"a step{key.removeprefix('steps')}")
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
    assert len([name for name in doubler.threads if "level 0" in name]) <= 1
    return doubler.calls, returned


async def while_busy(batcher, doubler, *jobs):
    """Tasks of `jobs`, (key, items) each, which arrive while the model computes something else."""
    doubler.open.clear()
    busy = asyncio.create_task(batcher.submit("busy", [0], 0, [1]))
    while not doubler.calls:
        await asyncio.sleep(0.001)
    tasks = []
    for key, items, *rest in jobs:
        tasks.append(asyncio.create_task(batcher.submit(key, items, 0, [1] * len(items), *rest)))
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
    assert [len(report.queued) for report in reports] == [1, 2]


def test_a_task_of_several_batches_waits_for_its_first_one_only():
    reports = []
    run(scenario_of(("k", [1, 2, 3])), max_tokens=2, report=reports.append)
    assert [len(report.queued) for report in reports] == [1, 1, 0]


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


def order(calls):
    """The names of the calls, without those of steps."""
    return [call[0] for call in calls if isinstance(call, tuple)]


def test_the_earliest_deadline_is_first_and_before_others_that_came_earlier():
    jobs = [("k", [1]), ("steps late", [2], False, 20.0), ("steps early", [3], False, 10.0), ("k", [4])]
    calls, results = run(scenario_of(*jobs), max_tokens=10)
    assert order(calls)[1:] == ["steps early", "steps late", "k"]
    assert results == [[2], [4], [6], [8], [0]]


def test_others_are_computed_before_each_step_of_a_deadline_but_the_first():
    """It has waited for a batch already. An earlier deadline comes before the first step, too."""
    jobs = [("k", [1], 0, [1], True), ("steps early", [2], 0, [1], False, 10.0), ("k", [3], 0, [3], True)]
    calls = arriving_between_steps(("steps late", [4, 5], 0, [1] * 2, False, 20.0), *jobs)
    assert calls[1:] == [
        ("steps early", [[2]]),
        "a step early",
        "a step late",
        ("k", [[1]]),
        "a step late",
        ("k", [[3]]),
    ]


def test_deadlines_that_keep_coming_do_not_starve_others():
    async def scenario(batcher, doubler):
        cascade = asyncio.create_task(batcher.submit("steps", [1, 2, 3], 0, [100] * 3, False))

        async def client():
            for count in range(100):
                if cascade.done():
                    return count
                await batcher.submit("steps of a deadline", [1], 0, [1], False, 1.0)
            return None

        return await asyncio.gather(client(), client()), await cascade

    _, (counts, result) = run(scenario, max_tokens=4)
    assert None not in counts and result == [2, 4, 6]


def arriving_between_steps(first, *jobs, max_tokens=3):
    """What is computed, call by call, if `jobs` arrive while the first task is before its second step."""

    async def scenario(batcher, doubler):
        doubler.open.clear()
        tasks = [asyncio.create_task(batcher.submit(*first))]
        while not doubler.calls:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher.submit(*job)) for job in jobs]
        await asyncio.sleep(0)
        doubler.open.set()
        return await asyncio.gather(*tasks)

    return run(scenario, max_tokens=max_tokens)[0]


def test_a_deadline_interrupts_a_cascade_between_two_steps():
    cascade = ("steps of a cascade", [1, 2, 3], 0, [3] * 3, False)
    late = ("steps late", [4], 0, [1], False, 20.0)
    early = ("steps early", [5], 0, [1], False, 10.0)
    calls = arriving_between_steps(cascade, late, early)
    assert order(calls) == ["steps of a cascade", "steps early", "steps late"]
    assert calls[-3:] == ["a step of a cascade"] * 3


def test_a_deadline_interrupts_a_later_one_and_no_earlier_one():
    def one(name, end):
        return (f"steps {name}", [1, 2], 0, [1] * 2, False, end)

    calls = arriving_between_steps(one("late", 20.0), one("early", 10.0))
    assert calls[-4:] == ["a step early"] * 2 + ["a step late"] * 2
    calls = arriving_between_steps(one("early", 10.0), one("late", 20.0))
    assert calls[1] == "a step early" and calls[-2:] == ["a step late"] * 2


def test_a_small_cascade_passes_a_large_one_and_not_the_other_way_round():
    large = ("steps large", list(range(4)), 0, [3] * 4, False)
    small = ("steps small", [1], 0, [3], False)
    calls = arriving_between_steps(large, small)
    assert calls[2] == "a step small" and calls[3:] == ["a step large"] * 4
    calls = arriving_between_steps(small, large)
    assert calls[1] == "a step small" and calls[-4:] == ["a step large"] * 4


def test_a_cascade_that_is_nearly_done_is_not_interrupted_by_another():
    async def scenario(batcher, doubler):
        first = asyncio.create_task(batcher.submit("steps first", list(range(4)), 0, [3] * 4, False))
        while len(doubler.calls) < 4:
            await asyncio.sleep(0)
        second = asyncio.create_task(batcher.submit("steps second", [1], 0, [3], False))
        return await asyncio.gather(first, second)

    calls, _ = run(scenario, max_tokens=3)
    assert order(calls) == ["steps first", "steps second"]
    assert calls.index("a step second") > max(at for at, call in enumerate(calls) if call == "a step first")


def test_few_tasks_are_interrupted_at_one_time():
    """Each deadline is earlier than the one before."""
    depth, deepest = 0, 0

    class Nested(Doubler):
        def __call__(self, key, shares, between):
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            self.calls.append(key)
            if len(self.calls) < 30:
                asyncio.run_coroutine_threadsafe(self.another(), self.loop).result()
            between()
            depth -= 1
            return [list(shares[0])]

        async def another(self):
            end = 1000.0 - len(self.calls)
            self.tasks.append(asyncio.create_task(self.batcher.submit("k", [1], 0, [1], False, end)))
            await asyncio.sleep(0)

    async def main():
        doubler = Nested()
        async with Batcher(doubler, 10) as doubler.batcher:
            doubler.loop, doubler.tasks = asyncio.get_running_loop(), []
            await doubler.another()
            while not all(task.done() for task in doubler.tasks):
                await asyncio.sleep(0.001)
            return len(doubler.tasks)

    assert asyncio.run(asyncio.wait_for(main(), 20)) == 30
    assert deepest == MAX_INTERRUPTED
