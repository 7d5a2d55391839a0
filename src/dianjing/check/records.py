"""A chunk of a file -> findings in its records, with the few numbers that the whole set needs."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from dianjing.check.chunk import ChunkResult, Where, add_record
from dianjing.check.codes import Finding
from dianjing.check.fixes import Change, corrected, read_value
from dianjing.check.tokens import Measurer, Reading
from dianjing.constants import IMAGE_MARKER
from dianjing.data.file_kind import likely_encoding, named_encoding
from dianjing.data.read import too_large
from dianjing.data.record import NOTICES, Place, Record, examine
from dianjing.data.split import MAX_RECORD_BYTES, Chunk


@dataclass(frozen=True, kw_only=True)
class Job:
    """One data file and what is looked for in it."""

    path: str
    lines: bool
    """It is JSONL."""
    reading: Reading | None = None


class RecordChecker:
    """Checks chunks of one file; made once in each process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._measurer = Measurer(job.reading) if job.reading else None
        self._special_strings = self._measurer.special_strings if self._measurer else ()
        with open(job.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def __call__(self, chunk: Chunk) -> ChunkResult:
        """Return what the records of a chunk are like."""
        result = ChunkResult()
        records: list[Record | None] = []
        line, position = chunk.first_line, chunk.start
        for number, (start, end) in enumerate(chunk.elements, chunk.first_record):
            line += self._data[position:start].count(b"\n")
            position = start
            place = Place(self._job.path, number, line if self._job.lines else 0)
            records.append(self._record(result, place, line, start, end))
        if self._measurer:
            self._measure(result, self._measurer, records)
        return result

    def _record(self, result: ChunkResult, place: Place, line: int, start: int, end: int) -> Record | None:
        """Check one record; return it, corrected where that is certain."""
        before = len(result.findings)
        value, mended = self._value(result, place, line, start, end)
        examined = examine(value, place) if value is not None else None
        usable = examined is not None and examined.record is not None and not mended
        where = Where(place.source, place.index, examined.id if examined else str(place.index), line)
        if examined and isinstance(value, dict):
            fields = cast(dict[str, object], value)
            if not usable or examined.noticed or not isinstance(fields.get("id"), str):
                right, changes = corrected(fields, place.index)
                examined = examine(right, place)
                whole = not examined.problems
                result.findings += [where.finding(one.code, _said(one), one.field, fixed=whole) for one in changes]
        if mended and not (examined and examined.record):
            result.findings[before:] = [replace(one, fixed=False) for one in result.findings[before:]]
        if examined:
            result.findings += [where.finding(one.code, str(one), one.field) for one in examined.problems]
            if not examined.problems:  # else the turns are not what was meant
                result.findings += [where.finding(code, NOTICES[code]) for code in examined.noticed]
        record = examined.record if examined else None
        result.ids.append(where.id)
        result.lines.append(line)
        result.usable.append(usable)
        result.images.append(record.images if record else ())
        add_record(result, where, record, self._special_strings)
        return record

    def _value(self, result: ChunkResult, place: Place, line: int, start: int, end: int) -> tuple[object, bool]:
        """Return a record's JSON value, None when there is none, and whether it had to be mended."""
        where = Where(place.source, place.index, str(place.index), line)
        if end - start > MAX_RECORD_BYTES:
            result.findings.append(where.finding("record_too_large", too_large(end - start)))
            return None, False
        data = self._data[start:end]
        try:
            text = data.decode()
            value, changes = read_value(text)
        except UnicodeDecodeError as error:
            code, text = self._encoding
            result.findings.append(
                where.finding(code, f"byte {start + error.start} {text}", fixed=code == "encoding_known")
            )
            return None, False
        except json.JSONDecodeError as error:
            result.findings.append(
                self._flaw(where, start, data.decode(), error.pos, "json_syntax", f"not JSON: {error.msg}")
            )
            return None, False
        except (ValueError, RecursionError) as error:
            result.findings.append(where.finding("json_syntax", f"not JSON that can be read: {error}"))
            return None, False
        for change in changes:
            said = (
                f"a comment: {change.before}" if change.code == "json_comment" else "a comma before a closing bracket"
            )
            flaw = self._flaw(where, start, text, change.offset, change.code, said)
            result.findings.append(replace(flaw, fixed=True))
        if value is None:
            result.findings.append(where.finding("not_a_record", "null, not a record"))
        return value, bool(changes)

    @cached_property
    def _encoding(self) -> tuple[str, str]:
        """Return code and words for a record that is not UTF-8."""
        encoding = likely_encoding(self._data)
        if not encoding:
            return "encoding", "is not UTF-8"
        return "encoding_known", f"is not UTF-8; the file is {named_encoding(encoding)}"

    def _flaw(self, where: Where, start: int, text: str, offset: int, code: str, said: str) -> Finding:
        """Return a finding that names the line and column of a place in a record's text."""
        before = text[:offset]
        lines = before.count("\n")
        if not lines:
            before = self._data[self._data.rfind(b"\n", 0, start) + 1 : start].decode(errors="replace") + before
        column = len(before) - before.rfind("\n")
        return replace(where.finding(code, said), line=where.line + lines, column=column)

    def _measure(self, result: ChunkResult, measurer: Measurer, records: list[Record | None]) -> None:
        known = [(i, record) for i, record in enumerate(records) if record]
        result.measured = [[] for _ in records]
        for (i, record), measured in zip(known, measurer.measure([record for _, record in known]), strict=True):
            result.measured[i] = measured
            where = Where(record.source, record.index, record.id, result.lines[i])
            for one in {one.code: one for one in measured if one.code}.values():
                result.findings.append(where.finding(one.code, one.text))


def _said(change: Change) -> str:
    if change.code == "marker_missing":
        return f"1 image but no {IMAGE_MARKER} marker; it belongs in front of the first question"
    if change.code == "id_missing":
        return f'there is no id; "{change.after}" would be one'
    if change.code == "role_unknown":
        return f"{change.field} is from the system, which has no place in a record; it would be left out"
    return f"{change.field} is {json.dumps(change.before, ensure_ascii=False)}; it should be {json.dumps(change.after)}"
