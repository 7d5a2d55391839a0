"""The number of calls under way at once, with the pause that all of them share."""

from __future__ import annotations

import asyncio
import random
import time

PAUSE_SECONDS = 2.0
"""First pause when an endpoint limits the rate and does not say for how long; it doubles."""
LONGEST_PAUSE_SECONDS = 600.0
MOST_PAUSES = 10
"""Pauses in a row without an answer between them, after which a run gives up."""


class RateLimiter:
    """Lets calls through: fewer after each refusal for coming too fast, one more again after a volley of answers."""

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.limit = concurrency
        self.under_way = 0
        self.stopped = asyncio.Event()
        self.reason = ""
        """Why the run stops, once it does."""
        self._open_at = 0.0
        self._pauses = 0
        self._answers = 0
        self._changed = asyncio.Event()

    def stop(self, reason: str) -> None:
        """Let no other call through; those under way come to their end."""
        self.reason = self.reason or reason
        self.stopped.set()
        self._tell()

    @property
    def pause_seconds(self) -> float:
        """Return how long the shared pause still lasts."""
        return max(0.0, self._open_at - time.monotonic())

    async def enter(self) -> bool:
        """Wait until a call may be made; return False if none may be made any more."""
        while not self.stopped.is_set():
            if self.pause_seconds:
                await self.sleep(self.pause_seconds)
            elif self.under_way < self.limit:
                self.under_way += 1
                return True
            else:
                await self.change()
        return False

    def leave(self) -> None:
        """Say that a call came to its end."""
        self.under_way -= 1
        self._tell()

    async def change(self) -> None:
        """Wait until a call that is under way comes to its end, or none may be made any more."""
        await self._changed.wait()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def sleep(self, seconds: float) -> None:
        """Wait; a stop ends it."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopped.wait()
        except TimeoutError:
            pass

    def answered(self) -> None:
        """Say that the endpoint answered: after as many answers as may be under way, one more may."""
        self._pauses = 0
        self._answers += 1
        if self._answers >= self.limit:
            self._answers = 0
            self.limit = min(self.limit + 1, self.concurrency)

    def pause(self, asked_seconds: float | None) -> float:
        """Let no call start for a while, because one came too fast; return for how many seconds from now.

        Calls that were under way together count as one refusal: they halve the limit once.
        """
        if not self.pause_seconds:
            self.limit = max(1, self.limit // 2)
            self._answers = 0
            self._pauses += 1
        seconds = asked_seconds
        if seconds is None:
            seconds = full_jitter(PAUSE_SECONDS, self._pauses, LONGEST_PAUSE_SECONDS)
        if seconds > LONGEST_PAUSE_SECONDS:
            self.stop(f"the endpoint asks to wait {seconds:.0f} s; run the same command again then")
        elif self._pauses > MOST_PAUSES:
            self.stop(f"the endpoint refused {MOST_PAUSES} times in a row for coming too fast; run again later")
        else:
            self._open_at = max(self._open_at, time.monotonic() + seconds)
        return self.pause_seconds


def full_jitter(first_seconds: float, number: int, most_seconds: float) -> float:
    """Return how long to wait before try `number` + 1: anything up to a bound that doubles each time."""
    return random.uniform(0, min(most_seconds, first_seconds * 2 ** (number - 1)))
