"""A file of JSON lines that is only ever appended to, each line on disk before anything else happens."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from dianjing.errors import DataError
from dianjing.lock import try_lock, unlock

Take = Callable[[dict[str, Any]], None]
"""Is given each line after the first, in order; ValueError, TypeError or KeyError: it is not a line of this kind."""


class JournalFile:
    """One journal; while open it is locked, and can be written."""

    def __init__(self, path: Path, header: Mapping[str, Any], instead: str) -> None:
        self.path = path
        self._header = dict(header)
        """The first line, which says what kind of journal it is."""
        self._instead = instead
        """The way out for a user who cannot have this file."""
        self._file = -1

    def open(self, take: Take) -> None:
        """Lock and read the journal; a missing one is made.

        Raises:
            DataError: another process has it open, or it is not a journal of this kind.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not try_lock(self._file):
                raise DataError(f"{self.path}: another run is writing it; wait for it, or {self._instead}")
            whole = self.read(take)
        except BaseException:
            self.close()
            raise
        os.ftruncate(self._file, whole)
        if not whole:
            self.append(self._header)
        elif os.pread(self._file, 1, whole - 1) != b"\n":
            os.write(self._file, b"\n")

    def close(self) -> None:
        """Give the lock back."""
        unlock(self._file)
        self._file = -1

    def read(self, take: Take) -> int:
        """Hand over what is on disk, if anything is, and return how many bytes of it are whole lines.

        The last line of a killed run may be torn, and is left out.

        Raises:
            DataError: a line other than the last does not belong to this journal.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        *lines, last = content.split(b"\n")
        torn = 0 if _is_object(last) else len(last)
        if torn and not lines and not json.dumps(self._header).startswith(last.decode(errors="replace")):
            raise DataError(f"{self.path}: not a journal; move it away, or {self._instead}")
        lines += [last] if last and not torn else []
        for number, line in enumerate(lines, 1):
            try:
                fields: Any = json.loads(line)
                if not isinstance(fields, dict) or (number == 1 and fields != self._header):
                    raise ValueError("it is of another kind")
                if number > 1:
                    take(cast(dict[str, Any], fields))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(
                    f"{self.path}: line {number} is not a line of this journal ({error}); remove that line if you "
                    "edited it, or move the file away to start again"
                ) from None
        return len(content) - torn

    def append(self, fields: Mapping[str, Any]) -> None:
        """Write a line and have it on disk.

        Raises:
            OSError: the disk is full; nothing of the line stays.
        """
        line = json.dumps(fields, ensure_ascii=True).encode() + b"\n"
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # what a short write to a file means
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)  # or the next line would stand in the middle of this one
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _is_object(line: bytes) -> bool:
    """Return whether a line is a whole JSON object, which no beginning of one is."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
