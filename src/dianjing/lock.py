"""An exclusive lock on an open file, which the operating system gives back when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os

_held: set[int] = set()


def try_lock(descriptor: int) -> bool:
    """Lock an open file; return False when someone else has it locked. `unlock` gives it back.

    Processes that are forked later do not hold the lock.

    Raises:
        OSError: this file system cannot lock files.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _held.add(descriptor)
    return True


def unlock(descriptor: int) -> None:
    """Close the file, and with it give back its lock."""
    _held.discard(descriptor)
    os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)  # or a loader worker that outlives its run for a moment would keep it locked
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
