"""Data files held open, whose records are parsed when they are asked for."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dianjing.config.schema import DataConfig
from dianjing.data.read import Place, is_lines, unreadable
from dianjing.data.record import Record, parse_record, turns_alone
from dianjing.errors import DataError

READ_BYTES = 2**20
WHOLE = -1
"""In the place of a turn's number: the whole record."""


class DataFile:
    """A data file, held open: what is read later is what was read first, or an error.

    Raises:
        DataError: it is missing, or of another kind.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines = is_lines(path)
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from None
        weakref.finalize(self, os.close, self.number)
        self._state = self._look()
        self.size = self._state[1]

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self._state)

    def read(self, start: int, end: int) -> bytes:
        """Return some of its bytes.

        Raises:
            DataError: the file was written to, or cannot be read.
        """
        try:
            found = os.pread(self.number, end - start, start)
        except OSError as error:
            raise unreadable(self.path, error) from None
        self.require(self._look())
        return found

    def digest(self) -> bytes:
        """Return the SHA-256 of all its bytes."""
        digest = hashlib.sha256()
        for start in range(0, max(self.size, 1), READ_BYTES):
            digest.update(self.read(start, start + READ_BYTES))
        return digest.digest()

    def require(self, state: tuple[int, int, int]) -> None:
        """Refuse a file that is not as it was when it was opened.

        Raises:
            DataError: its inode, its size or its time is another.
        """
        if state != self._state:
            raise DataError(f"{self.path}: it was changed after it was opened; start again, and leave it as it is")

    def _look(self) -> tuple[int, int, int]:
        seen = os.fstat(self.number)
        return seen.st_ino, seen.st_size, seen.st_mtime_ns


def open_files(config: DataConfig) -> list[DataFile]:
    """Return the data files of a recipe, open.

    Raises:
        DataError: a file, or the folder of the pictures, is not there.
    """
    if config.images and not os.path.isdir(config.images):
        raise DataError(f"{config.images}: there is no such image folder; name it (data.images)")
    return [DataFile(path) for path in ([config.path] if isinstance(config.path, str) else config.path)]


def _reopen(path: str, state: tuple[int, int, int]) -> DataFile:
    file = DataFile(path)
    file.require(state)
    return file


class Records:
    """Records by number, of which only the places are kept in memory.

    `rows` have the fields file (its number), start and end (bytes), record, line and turn.
    """

    def __init__(self, files: Sequence[DataFile], rows: NDArray[np.void]) -> None:
        self._files = files
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Record]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Record:
        row: Any = self._rows[number]
        file = self._files[int(row["file"])]
        place = Place(file.path, int(row["record"]), int(row["line"]))
        value = json.loads(file.read(int(row["start"]), int(row["end"])).decode())
        record, _ = parse_record(value, place)
        return record if row["turn"] == WHOLE else turns_alone(record)[int(row["turn"])]
