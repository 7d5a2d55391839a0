"""The gate: how many calls at once, and the pause that all share."""

from __future__ import annotations

import asyncio

import pytest

from dianjing.make.rate_limiter import LONGEST_PAUSE_SECONDS, MOST_PAUSES, RateLimiter, full_jitter


def test_no_more_than_the_limit_at_once() -> None:
    async def story() -> int:
        gate, most = RateLimiter(3), 0

        async def call() -> None:
            nonlocal most
            assert await gate.enter()
            most = max(most, gate.under_way)
            await asyncio.sleep(0)
            gate.leave()

        await asyncio.gather(*(call() for _ in range(20)))
        assert gate.under_way == 0
        return most

    assert asyncio.run(story()) == 3


def test_one_volley_of_refusals_halves_once_and_answers_bring_it_back() -> None:
    async def story() -> None:
        gate = RateLimiter(8)
        for _ in range(8):
            gate.pause(30)
        assert gate.limit == 4
        assert 29 < gate.pause_seconds <= 30
        for _ in range(4 + 5 + 6 + 7):
            gate.answered()
        assert gate.limit == 8
        gate.answered()
        assert gate.limit == 8

    asyncio.run(story())


@pytest.mark.parametrize("asked", [LONGEST_PAUSE_SECONDS + 1, 0.0])
def test_waiting_has_an_end(asked: float) -> None:
    async def story() -> int:
        gate = RateLimiter(2)
        times = 0
        while not gate.stopped.is_set():
            gate.pause(asked)
            times += 1
        assert not await gate.enter()
        assert gate.reason
        return times

    assert asyncio.run(story()) == (1 if asked else MOST_PAUSES + 1)


def test_a_stop_wakes_all_who_wait() -> None:
    async def story() -> list[bool]:
        gate = RateLimiter(1)
        await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        gate.stop("first")
        gate.stop("second")
        assert gate.reason == "first"
        await gate.sleep(60)
        return await asyncio.gather(*waiting)

    assert asyncio.run(story()) == [False] * 3


def test_full_jitter_doubles_its_bound() -> None:
    for number, bound in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 60.0)):
        waits = [full_jitter(1.0, number, 60.0) for _ in range(200)]
        assert 0 <= min(waits) < bound / 4
        assert bound * 3 / 4 < max(waits) <= bound
