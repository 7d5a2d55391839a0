"""The same work on many pieces, on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 4
"""Tasks a process that are waiting, so that none is idle and few results wait in memory."""

_work: Callable[[Any], Any]


def spread(make: Callable[[], Callable[[Task], Result]], tasks: Iterable[Task], workers: int = 0) -> Iterator[Result]:
    """Yield what the function that `make` returns makes of each task, in order.

    `make` is called once a process (0 `workers`: as many as there are cores); a single task needs none of them.
    """
    rest = iter(tasks)
    first = list(islice(rest, 2))
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or len(first) < 2:
        yield from map(make(), chain(first, rest))
        return
    waiting: deque[Future[Result]] = deque()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(make,)) as pool:
        try:
            for task in chain(first, rest):
                waiting.append(pool.submit(_run, task))
                if len(waiting) > AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says it, once
    _work = make()


def _run(task: Any) -> Any:
    return _work(task)
