"""Benchmark files -> their rows, each known by its number; what is broken is named with the row and a way out."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from dianjing.benchmark.item import LETTERS
from dianjing.errors import DataError

AGAIN = "download the file again, or mend the row"


class Row(NamedTuple):
    """One row of a file, and where it stands."""

    where: str
    """For an error: the file and the number of the row."""
    values: Mapping[str, Any]

    def text(self, name: str) -> str:
        """Return a field as text.

        Raises:
            DataError: it is missing or empty.
        """
        value = self.values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f'{self.where}: "{name}" is {"empty" if name in self.values else "missing"}; {AGAIN}')
        return value

    def options(self, names: Sequence[str]) -> dict[str, str]:
        """Return the options that are there, by letter; empty ones and "nan" are none.

        Raises:
            DataError: there are fewer than two.
        """
        found = {LETTERS[i]: str(self.values[name]) for i, name in enumerate(names) if _is_there(self.values.get(name))}
        if len(found) < 2:
            raise DataError(f"{self.where}: fewer than two options ({', '.join(names)}); {AGAIN}")
        return found

    def letter(self, name: str, options: Mapping[str, str]) -> str:
        """Return the letter of the right option; "" where the file names none (a test set).

        Raises:
            DataError: it is not the letter of an option.
        """
        value = str(self.values.get(name) or "").strip()
        if value and value != "nan" and value not in options:
            raise DataError(f'{self.where}: "{name}" is {value!r}, but the options are {", ".join(options)}; {AGAIN}')
        return value if value in options else ""


def _is_there(value: Any) -> bool:
    return value is not None and str(value).strip() not in ("", "nan")


def read_table(file: Path, columns: Sequence[str], delimiter: str = "\t") -> list[Row]:
    """Return the rows of a TSV or CSV file that must have `columns`.

    Raises:
        DataError: it cannot be read, a column is missing, or a row is cut.
    """
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        header = next(lines, [])
        _require(file, header, columns)
        for number, line in enumerate(lines, 1):
            if len(line) != len(header):
                raise DataError(
                    f"{file}: row {number} has {len(line)} of {len(header)} columns: it is cut, or holds a stray "
                    f"{'tab' if delimiter == chr(9) else 'comma'}; {AGAIN}"
                )
            rows.append(Row(f"{file}: row {number}", dict(zip(header, line, strict=True))))
    except csv.Error as error:
        raise DataError(f"{file}: row {len(rows) + 1} cannot be read ({error}); {AGAIN}") from None
    return _some(file, rows)


def read_json(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error}); download the file again") from None


def read_lines(file: Path, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a file with a JSON object a line.

    Raises:
        DataError: a row is not an object or lacks a field.
    """
    rows: list[Row] = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{file}: row {number} is not JSON ({error}); {AGAIN}") from None
            rows.append(_row(file, number, value, columns))
    return _some(file, rows)


def rows_of(file: Path, values: Any, columns: Sequence[str]) -> list[Row]:
    """Return the rows of a JSON list.

    Raises:
        DataError: it is not a list of objects with these fields.
    """
    if not isinstance(values, list):
        raise DataError(f"{file}: a list of questions is needed, not {type(values).__name__}; is it the right file?")
    return _some(file, [_row(file, number, value, columns) for number, value in enumerate(values, 1)])


def part(file: Path, content: Any, name: str) -> Any:
    """Return one part of a JSON object.

    Raises:
        DataError: it is not there.
    """
    if not isinstance(content, dict) or name not in content:
        raise DataError(f'{file}: "{name}" is missing; is it the file that the benchmark\'s maker publishes?')
    return content[name]


def objects_in(file: Path, content: Any) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(content, dict):
        raise DataError(f"{file}: an object by name is needed, not {type(content).__name__}; is it the right file?")
    return content


def picture_bytes(row: Row, encoded: str) -> bytes:
    """Return the file of a picture that stands in a row as base64.

    Raises:
        DataError: it is not base64, or not a picture.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except (binascii.Error, ValueError, OSError, SyntaxError, UnidentifiedImageError):
        raise DataError(f"{row.where}: its picture is not a whole picture in base64; {AGAIN}") from None
    return content


def files_in(folder: Path, ending: str) -> Iterator[Path]:
    """Yield the files of a folder with an ending, in order.

    Raises:
        DataError: there is none.
    """
    found = [folder] if folder.is_file() else sorted(folder.glob(f"*{ending}"))
    if not found:
        raise DataError(f"{folder}: no {ending} file is there; name the file or the folder that the maker publishes")
    yield from found


def _row(file: Path, number: int, value: Any, columns: Sequence[str]) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{file}: row {number} is not an object; {AGAIN}")
    if missing := [name for name in columns if name not in value]:
        raise DataError(f"{file}: row {number} lacks {', '.join(missing)}; {AGAIN}")
    return Row(f"{file}: row {number}", value)


def _some(file: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise DataError(f"{file}: no question is in it; download the file again")
    return rows


def _require(file: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in header]:
        raise DataError(
            f"{file}: row 0 (the names of the columns) lacks {', '.join(missing)}; it has {', '.join(header)[:200]}: "
            "is it the file that the benchmark's maker publishes?"
        )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start}); download the file again") from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; name the file or the folder that the maker publishes") from None
