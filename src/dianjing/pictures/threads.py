"""Pictures decoded and resized on all cores: Pillow computes without Python's lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

WARNINGS = threading.RLock()
"""Held while Python's filters of warnings are changed for one picture: they are the whole process's."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def on_all_cores(make: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """Return `make(item)` for each item, in their order; the first error of them is raised."""
    with one_thread_a_core() as pool:
        return list(pool.map(make, items))


def one_thread_a_core() -> ThreadPoolExecutor:
    """Return as many threads as there are cores for this process."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None)
