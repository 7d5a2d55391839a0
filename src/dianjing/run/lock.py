"""One writer for each run: its folder is locked while a process trains in it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from dianjing.errors import ConfigError, shortened
from dianjing.lock import try_lock, unlock
from dianjing.run.layout import LOCK


@contextmanager
def locked(run: Path, notify: Callable[[str], object]) -> Generator[None]:
    """Keep other processes from writing a run; its folder is made, and removed again if nothing was written.

    `notify` gets a line when this file system cannot lock files.

    Raises:
        ConfigError: another process writes the run, or the folder cannot be written to.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = _take(run, notify)
    except OSError as error:
        raise ConfigError(f"{run}: a run cannot be written there: {error.strerror}; choose another output") from None
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)  # before it is given back: the next writer makes its own
        unlock(descriptor)
        with suppress(OSError):  # not empty: a run is there
            for folder in made:
                folder.rmdir()


def require_no_writer(run: Path) -> None:
    """Refuse a run that another process writes.

    Raises:
        ConfigError: names the process and its host.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            _require(run, descriptor)
        finally:
            unlock(descriptor)


def _take(run: Path, notify: Callable[[str], object]) -> int:
    """Return the open lock file of a run, with this process's name in it."""
    while True:
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _require(run, descriptor)
        except ConfigError:
            os.close(descriptor)
            raise
        except OSError as error:
            notify(
                f"{run / LOCK}: this file system cannot lock files ({error.strerror}); make sure that no second "
                "process writes this run"
            )
        if _is_at(run / LOCK, descriptor):
            break
        unlock(descriptor)  # the last writer has removed it since
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _require(run: Path, descriptor: int) -> None:
    if not try_lock(descriptor):
        writer = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
        raise ConfigError(f"{run}: {shortened(writer)} is writing this run; stop it or wait, or choose another output")


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
