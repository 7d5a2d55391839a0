"""A JSON or JSONL file -> its JSON values, each with the place where it stands."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import cast

from dianjing.data.file_kind import likely_encoding, named_encoding
from dianjing.data.split import MAX_RECORD_BYTES, Flaw, mapped, split
from dianjing.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a record stands, for messages."""

    source: str
    index: int
    line: int

    def __str__(self) -> str:
        return f"{self.source}: " + (f"line {self.line}" if self.line else f"record {self.index}")


def read_records(path: str, problems: list[str]) -> list[tuple[Place, object]]:
    """Return the JSON values of a file with their places; a bad line of a JSONL file is added to `problems`.

    Raises:
        DataError: the file is missing, is of another kind, is not JSON, or has a record too large to be parsed.
    """
    lines = is_lines(path)
    try:
        _require_json(path, lines)
        _require_small_records(path, lines)
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from None
    before = len(problems)
    found = _read_lines(path, text, problems) if lines else _read_list(path, text)
    if not found and len(problems) == before:
        raise DataError(f"{path}: there is no record in it")
    return found


WAY_OUT = {
    "not_json": "",
    "encoding_known": "; `dianjing check {path} --fix OUT.json` writes it in UTF-8",
    "json_wrapped": "; `dianjing check {path} --fix OUT.json` writes this list",
    "json_layout": "; `dianjing check {path} --convert OUT.json` may read it",
    "json_list_in_lines": "",
}
"""Flaws of a file that is something else than its name says -> how to go on."""


def _require_json(path: str, lines: bool) -> None:
    with mapped(path) as data:
        for found in split(data, lines=lines):
            if not isinstance(found, Flaw) or found.code not in ("bom", *WAY_OUT):
                return
            if found.code != "bom":
                raise DataError(f"{path}: {found.text}{WAY_OUT[found.code].format(path=path)}")


def _require_small_records(path: str, lines: bool) -> None:
    if os.path.getsize(path) <= MAX_RECORD_BYTES:
        return
    with mapped(path) as data:
        found = (one for one in split(data, lines=lines) if not isinstance(one, Flaw))
        for number, (start, end) in enumerate(found):
            if end - start > MAX_RECORD_BYTES:
                raise DataError(f"{path}: record {number}: {too_large(end - start)}")


def too_large(size: int) -> str:
    """Return the message about a record of this many bytes."""
    return (
        f"{size / 2**20:.0f} MB in one record; more than {MAX_RECORD_BYTES >> 20} are not parsed; look at what is in it"
    )


def is_lines(path: str) -> bool:
    """Return whether a data file is JSONL, and not a JSON list.

    Raises:
        DataError: its name tells neither.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".json", ".jsonl"):
        return suffix == ".jsonl"
    what = "and is not a folder" if os.path.isdir(path) else f'not in "{suffix}"'
    raise DataError(
        f"{path}: the data file must end in .json (a list) or .jsonl, {what}; "
        f"`dianjing check {path} --convert OUT.json` makes one of other formats"
    )


def unreadable(path: str, error: OSError | UnicodeDecodeError) -> DataError:
    """Return the error that says why a data file cannot be read."""
    if isinstance(error, OSError):
        return DataError(f"{path}: cannot be read ({error.strerror}); give a LLaVA JSON or JSONL file")
    with mapped(path) as data:
        encoding = likely_encoding(data)
    if not encoding:
        return DataError(f"{path}: cannot be read (it is not UTF-8 text); save it as UTF-8")
    return DataError(
        f"{path}: it is {named_encoding(encoding)} text, not UTF-8{WAY_OUT['encoding_known'].format(path=path)}"
    )


def _read_list(path: str, text: str) -> list[tuple[Place, object]]:
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(error)}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: it holds {kind_of(values)}, not a list of records; put [ and ] around them")
    return [(Place(path, i, 0), value) for i, value in enumerate(cast(list[object], values))]


def _read_lines(path: str, text: str, problems: list[str]) -> list[tuple[Place, object]]:
    found: list[tuple[Place, object]] = []
    filled = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for index, (number, line) in enumerate(filled):
        place = Place(path, index, number)
        try:
            found.append((place, read_line(line, place)))
        except DataError as error:
            problems.append(str(error))
    return found


def read_line(text: str, place: Place) -> object:
    """Return the JSON value of a line of a JSONL file.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place.source}: {_not_json(error, place.line)}") from None


def _not_json(error: Exception, first_line: int = 1) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
    return f"not JSON that can be read: {error}"


def kind_of(value: object) -> str:
    """Return how a message names a JSON value."""
    kinds = ((type(None), "null"), (dict, "an object"), (list, "a list"), (str, "a string"), (bool, "true or false"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a number")
