"""Which texts are computed next: merged, sorted, small ones first, bounded, and what is cancelled or fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from compress.serve.scheduling import ATTEMPTS, INTERACTIVE_SECONDS, ComputeError, Dispatch, Full, Job, Lane, Scheduler, retry_after


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def scheduler(budget: int = 100, speed: float = 2000, waiting: int = 10**6, seconds: float = 10**6) -> Scheduler:
    made = Scheduler(waiting, seconds)
    made.budget, made.speed = budget, speed
    return made


def job(*lengths: int, lane: Lane = (0, 0)) -> Job:
    rows = [np.full(length, length, dtype=np.int64) for length in lengths]
    return Job(rows, lane, np.zeros((len(rows), 1), dtype=np.float32), asyncio.get_running_loop().create_future())


def lengths_as_vectors(dispatch: Dispatch) -> np.ndarray:
    return np.array(dispatch.lengths, dtype=np.float32)[:, None]


def drain(made: Scheduler) -> list[Dispatch]:
    found = []
    while (dispatch := made.pick()) is not None:
        found.append(dispatch)
        made.finish(dispatch, lengths_as_vectors(dispatch), sum(dispatch.lengths) / made.speed)
    return found


@in_loop
async def test_requests_are_merged_up_to_the_budget_and_each_gets_its_own_vectors() -> None:
    made, jobs = scheduler(), [job(10, 20), job(30), job(40), job(50)]
    for one in jobs:
        made.submit(one)
    first, second = drain(made)
    assert (first.lengths, second.lengths) == ([50, 40], [30, 20, 10])  # a third text would be a batch of its own
    for one in jobs:
        await asyncio.wait_for(one.future, 1)
        assert one.vectors[:, 0].tolist() == [len(row) for row in one.rows]
    await asyncio.sleep(0)
    assert made.tokens == 0
    assert not made.wanted.is_set()


@in_loop
async def test_bulk_is_sorted_by_length_within_a_window_that_is_bounded() -> None:
    made = scheduler(speed=300)
    made.submit(job(*range(1, 60), *range(1, 60)))
    found = drain(made)
    lengths = [length for dispatch in found for length in dispatch.lengths]
    assert lengths[:64] == sorted(lengths[:64], reverse=True)  # the first window
    assert lengths[64:] == sorted(lengths[64:])  # the next begins where the first ended
    assert sorted(lengths) == sorted([*range(1, 60)] * 2)
    assert all(len(dispatch.lengths) * max(dispatch.lengths) <= 100 for dispatch in found)


@in_loop
async def test_a_dispatch_of_several_batches_fills_each_and_a_text_beyond_the_budget_is_one_alone() -> None:
    made = scheduler(speed=7000)
    made.submit(job(*[30] * 14, 150))
    assert [dispatch.lengths for dispatch in drain(made)] == [[150, *[30] * 6], [30] * 8]


@in_loop
async def test_single_texts_that_wait_are_sorted_as_well_and_none_waits_longer_than_for_two_windows() -> None:
    made, rng = scheduler(speed=1000), np.random.default_rng(0)
    window = made.speed * INTERACTIVE_SECONDS
    since: dict[Job, int] = {}
    computed = padded = 0
    for _ in range(400):
        while made.tokens < 3 * window:
            one = job(int(rng.integers(1, 60)))
            since[one] = computed
            made.submit(one)
        dispatch = made.pick()
        assert dispatch is not None
        computed += sum(dispatch.lengths)
        padded += len(dispatch.lengths) * max(dispatch.lengths)
        made.finish(dispatch, lengths_as_vectors(dispatch), 0.1)
        await asyncio.sleep(0)
        for done, _ in dispatch.texts:
            assert computed - since[done] <= 3 * window + 2 * window  # what waited before it, then two windows at most
    assert padded < 1.2 * computed  # 1.8 in the order in which they came


@in_loop
async def test_small_requests_pass_large_ones_which_are_not_starved() -> None:
    made = scheduler()
    large, small = job(*[50] * 40), [job(60) for _ in range(20)]
    for one in (large, *small):
        made.submit(one)
    leaders = ["large" if dispatch.texts[0][0] is large else "small" for dispatch in drain(made)]
    assert leaders[0] == "small"
    while_both_wait = leaders[: len(leaders) - leaders[::-1].index("small")]
    assert 0 < while_both_wait.count("large") <= while_both_wait.count("small")


@in_loop
async def test_no_large_request_holds_up_another() -> None:
    made = scheduler()
    huge, other = job(*[20] * 2000), job(*[20] * 10)
    made.submit(huge)
    made.pick()
    made.submit(other)
    while not other.future.done():
        dispatch = made.pick()
        assert dispatch is not None
        made.finish(dispatch, lengths_as_vectors(dispatch), 0.05)
    assert huge.missing > 1000


@in_loop
async def test_only_texts_of_one_lane_are_computed_together() -> None:
    made = scheduler()
    for index in range(6):
        made.submit(job(5, 6, lane=(0, index % 2)))
        made.submit(job(*[30] * 8, lane=(0, index % 2)))
    for dispatch in drain(made):
        assert {one.lane for one, _ in dispatch.texts} == {dispatch.lane}
    await asyncio.sleep(0)
    assert made.tokens == 0


@in_loop
async def test_what_waits_is_bounded_by_tokens_and_by_time() -> None:
    made = scheduler(waiting=500)
    made.submit(job(*[100] * 9))  # whoever comes first is taken, however large
    with pytest.raises(Full):
        made.submit(job(10))
    assert made.tokens == 900
    slow = scheduler(speed=100, seconds=2)
    for _ in range(3):
        slow.submit(job(100))
    with pytest.raises(Full) as full:
        slow.submit(job(1))
    assert retry_after(full.value) == 2


@in_loop
async def test_cancelled_requests_cost_nothing() -> None:
    made = scheduler()
    gone = [job(10, 20), job(*[30] * 50)]
    kept = job(7)
    for one in (*gone, kept):
        made.submit(one)
    part = made.pick()
    for one in gone:
        one.future.cancel()
    await asyncio.sleep(0)
    assert made.tokens == 7
    assert part is not None
    made.finish(part, lengths_as_vectors(part), 0.05)
    assert drain(made) == []
    assert kept.future.done()


@in_loop
async def test_a_failed_dispatch_is_computed_anew_each_request_alone() -> None:
    made, bad, good = scheduler(), job(10), job(*[20] * 8)
    made.submit(bad)
    made.submit(good)
    failures = 0
    while not (bad.future.done() and good.future.done()):
        dispatch = made.pick()
        assert dispatch is not None
        if any(one is bad for one, _ in dispatch.texts):
            failures += 1
            made.fail(dispatch, "RuntimeError")
        else:
            made.finish(dispatch, lengths_as_vectors(dispatch), 0.05)
    assert failures == ATTEMPTS
    assert good.vectors[:, 0].tolist() == [20] * 8
    with pytest.raises(ComputeError, match="RuntimeError"):
        await bad.future


@in_loop
async def test_vectors_of_an_earlier_attempt_are_not_mixed_in() -> None:
    made, one = scheduler(speed=1), job(*[60] * 4)
    made.submit(one)
    first, second = made.pick(), made.pick()
    assert first is not None
    assert second is not None
    made.fail(first, "its process ended")
    made.finish(second, lengths_as_vectors(second) * 0 - 1, 0.05)
    assert not one.future.done()
    drain(made)
    assert one.vectors[:, 0].tolist() == [60] * 4
