"""Processes that make packs: if one is killed or they answer no more, the run ends with a sentence.

torch's own time limit does not cover a process that stops while it hands a tensor over.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Event, Timer
from typing import TypeVar

from dianjing.errors import TrainError

WORKER_SECONDS = 300
"""How long a run waits for a pack before it gives the processes up."""
_KILLED = re.compile(r"DataLoader worker \(pid.*?\)+ (is killed by signal: (?P<name>[^.]*)|exited)")
Pack = TypeVar("Pack")


def from_workers(packs: Iterator[Pack]) -> Iterator[Pack]:
    """Yield what the processes of a loader make.

    Raises:
        TrainError: a process was killed, or they made nothing for WORKER_SECONDS; they have all ended then.
    """
    workers = multiprocessing.active_children()
    late = Event()

    def end() -> None:
        for worker in workers:
            worker.kill()  # one that is stopped would not hear SIGTERM

    def give_up() -> None:
        late.set()
        end()

    while True:
        timer = Timer(WORKER_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            pack = next(packs, None)
        except (RuntimeError, OSError, EOFError) as error:
            # OSError: what the process had handed over is fetched from it. One of its own is named as such.
            lost = _KILLED.search(str(error)) or not isinstance(error, RuntimeError)
            if not late.is_set() and (not lost or "in DataLoader worker process" in str(error)):
                raise
            end()
            raise _lost(str(error), late=late.is_set()) from None
        finally:
            timer.cancel()
        if pack is None:
            return
        yield pack


@contextmanager
def lost_workers_explained() -> Generator[None]:
    """Turn torch's error about a killed process, which can come at any moment, into ours.

    Raises:
        TrainError: a process was killed.
    """
    try:
        yield
    except RuntimeError as error:
        if not _KILLED.search(str(error)):
            raise
        raise _lost(str(error), late=False) from None


def _lost(said: str, *, late: bool) -> TrainError:
    if late:
        words = f"the processes that read pictures made nothing for {WORKER_SECONDS} seconds; look at their disk"
    else:
        found = _KILLED.search(said)
        reason = f"was killed ({found['name']})" if found and found["name"] else "ended"
        words = f"a process that reads pictures {reason}; was memory enough? If not, lower data.workers"
    return TrainError(f"{words}; --resume goes on from the last checkpoint")
