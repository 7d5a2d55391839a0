"""Files of JSON lines in a run's folder, from which damaged lines are left out.

A line can be torn by a crash of the machine, or in the middle of the file by two writers at once. It costs that line
alone, never the run: a resume removes it before it writes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dianjing.errors import CheckpointError
from dianjing.run.layout import JOURNAL

Fields = Mapping[str, tuple[type, ...]]
"""Fields that each line has, and the types they may be of."""
METRICS: Fields = {"step": (int,), "loss": (int, float), "learning_rate": (int, float)}
SAMPLE: Fields = {"step": (int,), "id": (str,), "question": (str,), "reference": (str,), "answer": (str,)}
SHOWN = 5
"""Damaged lines that are named."""


def read_journal(run: Path) -> list[dict[str, Any]]:
    """Return the metrics in a run's train.jsonl, damaged lines left out."""
    return read_rows(run / JOURNAL, METRICS)[0]


def read_rows(path: Path, fields: Fields) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects of a file of JSON lines, and the numbers of the damaged lines, counted from 1.

    A line is damaged if it is not a whole JSON object with these fields.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.is_file() else [], start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and all(type(row.get(name)) in kinds for name, kinds in fields.items()):
            rows.append(row)
        else:
            damaged.append(number)
    return rows, damaged


def rows_to_keep(path: Path, fields: Fields, last_step: int, notify: Callable[[str], object]) -> list[dict[str, Any]]:
    """Return the rows of a file up to a step; `notify` gets a line on damaged ones."""
    found, damaged = read_rows(path, fields)
    if damaged:
        more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        notify(f"{path}: damaged, and left out from here on: line {', '.join(map(str, damaged[:SHOWN]))}{more}")
    return [row for row in found if row["step"] <= last_step]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines, whole or not at all.

    Raises:
        CheckpointError: the disk is full, or cannot be written to.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text("".join(map(_line, rows)), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None


class Journal:
    """train.jsonl of a run, open for writing."""

    def __init__(self, run: Path, first_step: int, notify: Callable[[str], object]) -> None:
        self._path = run / JOURNAL
        self.rows = rows_to_keep(self._path, METRICS, first_step, notify)
        """Rows up to `first_step`, and those appended; later ones are dropped, since their steps are repeated."""
        write_rows(self._path, self.rows)
        self._file: TextIO = self._path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line.

        Raises:
            CheckpointError: the disk is full, or cannot be written to.
        """
        self.rows.append(dict(row))
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # of a line that `append` has failed with
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror}; make room; --resume goes on from the newest checkpoint"
    )
