"""A data file -> a copy in which all that is certain is fixed, with a list of the changes."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from dianjing.check.fixes import Change, corrected, read_value, with_names
from dianjing.data.file_kind import decodes, likely_encoding
from dianjing.data.read import is_lines
from dianjing.data.split import MAX_RECORD_BYTES, Element, Flaw, mapped, split
from dianjing.errors import DataError

UNREAD = ("json_unread", "encoding", "not_json", "json_layout")
SHOWN = 200
"""Characters of a record that is left out, in the list of changes."""


@dataclass(kw_only=True)
class Fixed:
    """The files written, with counts."""

    out: Path
    changes_file: Path
    records: int = 0
    changes: dict[str, int] = field(default_factory=dict[str, int])
    """Code -> how often."""
    left_out: int = 0
    """Records that cannot be read, and so cannot be copied."""


def fix(path: str, out: str, names: Mapping[str, tuple[str, str]]) -> Fixed:
    """Write the corrected copy of a data file to `out` (JSON or JSONL) and its changes next to it.

    `names` are the picture paths to replace: path -> (code, path as it should be).

    Raises:
        DataError: `out` is the data file itself, or a part of the data file cannot be told apart into records.
    """
    target = Path(out)
    fixed = Fixed(out=target, changes_file=target.with_suffix(".changes.jsonl"))
    _refuse(path, fixed)
    lines = is_lines(out)
    writing, changes_writing = (Path(f"{file}.writing") for file in (target, fixed.changes_file))
    try:
        with ExitStack() as stack:
            data, encoding = _in_utf8(stack.enter_context(mapped(path)))
            file = stack.enter_context(writing.open("w", encoding="utf-8"))
            changes_file = stack.enter_context(changes_writing.open("w", encoding="utf-8"))
            file.write("" if lines else "[")
            if encoding:
                _note(fixed, changes_file, {"record": None}, Change("encoding_known", "", encoding, "utf-8"))
            index = 0
            for found in split(data, lines=is_lines(path)):
                if isinstance(found, Flaw):
                    if found.code in UNREAD:
                        raise DataError(f"{path}: byte {found.offset}: {found.text}; correct this by hand first")
                    _note(fixed, changes_file, {"record": None}, Change(found.code, "", found.text, None))
                    continue
                _copy(fixed, (file, changes_file), _read(data, found), index, names, lines)
                index += 1
            file.write("" if lines else "\n]\n")
        writing.replace(target)
        changes_writing.replace(fixed.changes_file)
    finally:
        writing.unlink(missing_ok=True)
        changes_writing.unlink(missing_ok=True)
    return fixed


def _in_utf8(data: mmap.mmap | bytes) -> tuple[mmap.mmap | bytes, str]:
    """Return a file in UTF-8, and the encoding it was in; "" where it was UTF-8 or nothing is certain."""
    encoding = "" if decodes(data, "utf-8") else likely_encoding(data)
    return (data[:].decode(encoding).removeprefix("\ufeff").encode(), encoding) if encoding else (data, "")


def _refuse(path: str, fixed: Fixed) -> None:
    if fixed.out.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{fixed.out}: the copy is written as JSON or JSONL; name a .json or .jsonl file")
    for file in (fixed.out, fixed.changes_file):
        if file.exists() and os.path.samefile(file, path):
            raise DataError(f"{file}: this is the data file itself, which is never changed; name another file")
        if not file.parent.is_dir():
            raise DataError(f"{file.parent}: there is no such folder to write into; make it first")


def _read(data: mmap.mmap | bytes, element: Element) -> bytes | None:
    """Return the bytes of a record; None when they are too many."""
    start, end = element
    return data[start:end] if end - start <= MAX_RECORD_BYTES else None


def _copy(
    fixed: Fixed,
    files: tuple[IO[str], IO[str]],
    record: bytes | None,
    index: int,
    names: Mapping[str, tuple[str, str]],
    lines: bool,
) -> None:
    """Write one record, corrected, and its changes."""
    file, changes_file = files
    try:
        if record is None:
            raise ValueError("a record of more than 64 MB")
        value, changes = read_value(record.decode())
    except (ValueError, RecursionError):
        fixed.left_out += 1
        shown = (record or b"")[:SHOWN].decode(errors="replace")
        _note(fixed, changes_file, {"record": index}, Change("left_out", "", shown, None))
        return
    place: dict[str, object] = {"record": index}
    if isinstance(value, dict):
        fields, changed = corrected(cast(dict[str, object], value), index)
        value, renamed = with_names(fields, names)
        changes += changed + renamed
        place["id"] = value.get("id")
    file.write(_json(value) + "\n" if lines else f"{',' if fixed.records else ''}\n{_json(value)}")
    fixed.records += 1
    for change in changes:
        _note(fixed, changes_file, place, change)


def _note(fixed: Fixed, file: IO[str], place: Mapping[str, object], change: Change) -> None:
    fixed.changes[change.code] = fixed.changes.get(change.code, 0) + 1
    what = {"code": change.code, "field": change.field, "before": change.before, "after": change.after}
    file.write(_json({**place, **what}) + "\n")


def _json(value: object) -> str:
    """Return a value in one line, characters as they are, unless one is half a character."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
