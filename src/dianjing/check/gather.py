"""The files of a data set -> findings in single records, with the numbers that the rest of the check needs."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from dianjing.check.chunk import ChunkResult
from dianjing.check.codes import CODES, Finding, Findings
from dianjing.check.records import Job, RecordChecker
from dianjing.check.tokens import Reading
from dianjing.data.parallel import spread
from dianjing.data.read import is_lines
from dianjing.data.split import Chunk, chunks, mapped
from dianjing.errors import DataError
from dianjing.progress import Watch

ANOTHER_FILE = ("not_json", "json_layout")
"""Nothing is read of a file that is one of these."""
WHOLE_FILE = ("encoding", "encoding_known", "file_empty", "json_list_in_lines", *ANOTHER_FILE)
"""Because of one of them training refuses a file whole..."""
WHOLE_LIST = (
    *WHOLE_FILE,
    *("json_syntax", "json_unread", "json_comment", "json_trailing_comma", "json_not_a_list", "json_wrapped"),
)
"""...and because of one of these, if it is not JSONL."""
NOT_FIXED = ("json_unread", *ANOTHER_FILE)
"""--fix refuses a file with one of these."""


class Names:
    """Every picture of the check, once: (folder, path) -> its number."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], int] = {}

    def number(self, root: str, name: str) -> int:
        """Return the number of a picture, a new one if it is new."""
        return self.numbers.setdefault((root, name), len(self.numbers))


@dataclass(kw_only=True)
class Items:
    """The samples of a run, one entry each: a record, or one of its turns alone."""

    record: array[int] = field(default_factory=lambda: array("Q"))
    positions: array[int] = field(default_factory=lambda: array("Q"))
    """0 for one that is left out for its length."""
    supervised: array[int] = field(default_factory=lambda: array("Q"))
    truncated: array[int] = field(default_factory=lambda: array("Q"))
    pictures: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    """Item -> its pictures, where they are not all pictures of its record."""


@dataclass(kw_only=True)
class Gathered:
    """All records of some files, in order; an entry each unless said otherwise."""

    files: list[str] = field(default_factory=list[str])
    first: list[int] = field(default_factory=list[int])
    """The first record of each file."""
    refused: list[str] = field(default_factory=list[str])
    """Files that training does not read at all."""
    ids: list[str] = field(default_factory=list[str])
    lines: array[int] = field(default_factory=lambda: array("Q"))
    usable: list[bool] = field(default_factory=list[bool])
    content: array[int] = field(default_factory=lambda: array("Q"))
    alike: array[int] = field(default_factory=lambda: array("Q"))
    answer: array[int] = field(default_factory=lambda: array("Q"))
    long_answers: array[int] = field(default_factory=lambda: array("Q"))
    long_answers_of: array[int] = field(default_factory=lambda: array("Q"))
    pictures: array[int] = field(default_factory=lambda: array("Q"))
    """Pictures of all records, one after another."""
    picture_ends: array[int] = field(default_factory=lambda: array("Q"))
    items: Items = field(default_factory=Items)
    values: dict[str, Counter[str | int]] = field(default_factory=dict[str, Counter[str | int]])

    def pictures_of(self, record: int) -> array[int]:
        """Return the numbers of a record's pictures."""
        return self.pictures[self.picture_ends[record - 1] if record else 0 : self.picture_ends[record]]

    def finding(self, record: int, code: str, text: str, field: str = "", picture: str = "") -> Finding:
        """Return a finding about a record, which is counted over all files."""
        file = bisect_right(self.first, record) - 1
        return Finding(
            code=code,
            file=self.files[file],
            text=text,
            record=record - self.first[file],
            id=self.ids[record],
            line=self.lines[record],
            field=field,
            picture=picture,
        )

    def add(self, result: ChunkResult, root: str, names: Names) -> None:
        """Append the records of a chunk."""
        before = len(self.ids)
        self.ids += result.ids
        self.lines += result.lines
        self.usable += result.usable
        self.content += result.content
        self.alike += result.alike
        self.answer += result.answer
        self.long_answers += result.long_answers
        self.long_answers_of.extend(self.first[-1] + record for record in result.long_answers_of)
        for images in result.images:
            self.pictures.extend(names.number(root, name) for name in images)
            self.picture_ends.append(len(self.pictures))
        for name, values in result.values.items():
            self.values.setdefault(name, Counter()).update(values)
        for number, measured in enumerate(result.measured, before):
            whole = result.images[number - before]
            for one in measured:
                if one.images != whole:
                    own = tuple(names.number(root, name) for name in one.images)
                    self.items.pictures[len(self.items.record)] = own
                self.items.record.append(number)
                self.items.positions.append(one.positions)
                self.items.supervised.append(one.supervised)
                self.items.truncated.append(one.truncated)


def gather(
    paths: tuple[str, ...],
    images: str,
    names: Names,
    *,
    findings: Findings,
    watch: Watch,
    reading: Reading | None = None,
    workers: int = 0,
) -> Gathered:
    """Read files and return what is in them; `images` "" stands for the folder of each.

    Raises:
        DataError: a file cannot be read.
    """
    gathered = Gathered()
    for path in paths:
        gathered.files.append(path)
        gathered.first.append(len(gathered.ids))
        root = images or os.path.dirname(path) or "."
        job = Job(path=path, lines=is_lines(path), reading=reading)
        codes: set[str] = set()
        for found in _checked(job, workers, watch):
            if isinstance(found, ChunkResult):
                gathered.add(found, root, names)
            for finding in found.findings if isinstance(found, ChunkResult) else [found]:
                findings.add(finding)
                codes.add(finding.code)
        if len(gathered.ids) == gathered.first[-1] and codes.isdisjoint([*ANOTHER_FILE, "encoding_known"]):
            findings.add(Finding(code="file_empty", file=path, text="there is no record in it"))
            codes.add("file_empty")
        if not codes.isdisjoint(WHOLE_FILE if job.lines else WHOLE_LIST):
            gathered.refused.append(path)
        if not codes.isdisjoint(NOT_FIXED) or ("json_not_a_list" in codes and not any(gathered.alike)):
            findings.nothing_fixed(path)
    return gathered


def _checked(job: Job, workers: int, watch: Watch) -> Iterator[ChunkResult | Finding]:
    """Yield what the chunks of a file hold, then what is wrong between its records."""
    between: list[Finding] = []
    try:
        with mapped(job.path) as data:

            def tasks() -> Iterator[Chunk]:
                for found in chunks(data, lines=job.lines):
                    if isinstance(found, Chunk):
                        watch(f"records of {os.path.basename(job.path)}", found.elements[-1][1], len(data))
                        yield found
                    else:
                        flaw, line, column = found
                        finding = Finding(code=flaw.code, file=job.path, text=flaw.text, line=line, column=column)
                        between.append(replace(finding, fixed=CODES[flaw.code].fixed))

            yield from spread(partial(RecordChecker, job), tasks(), workers)
    except OSError as error:
        raise DataError(f"{job.path}: cannot be read ({error.strerror}); give a LLaVA JSON or JSONL file") from None
    yield from between
