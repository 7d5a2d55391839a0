"""Faults that only the whole set shows: duplicates, leaks, answers that tell nothing apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from dianjing.check.codes import Finding
from dianjing.check.duplicates import look_alike, repeated
from dianjing.check.gather import Gathered
from dianjing.check.pictures import THUMB, Picture
from dianjing.data.record import few_pictures

SAME_ANSWER_RECORDS = 10
SAME_ANSWER_SHARE = 0.02
"""A long answer is everywhere when this number of records have it, and this share of all."""
FEW_RECORDS = 5
"""Fewer may well have the same answer or picture."""
YES_NO_ANSWERS = 40
YES_NO_SHARE = 0.8


def record_findings(gathered: Gathered) -> Iterator[Finding]:
    """Yield records that are there twice, and answers that are the same in many."""
    names = {}
    for record, name in enumerate(gathered.ids):
        first = names.setdefault(name, record)
        if first != record:
            yield gathered.finding(record, "id_duplicate", f"the id of {_place(gathered, first)}", "id")
    same = dict(repeated(gathered.content))
    for record, first in same.items():
        yield gathered.finding(record, "record_duplicate", f"as {_place(gathered, first)}")
    for record, first in repeated(gathered.alike):
        if record not in same:
            text = f"as {_place(gathered, first)} but for capitals, spaces and punctuation"
            yield gathered.finding(record, "record_near_duplicate", text)
    yield from _answers(gathered)
    said = gathered.values.get("yes or no", Counter[str | int]())
    yes, no = said["yes"], said["no"]
    if yes + no >= YES_NO_ANSWERS and max(yes, no) > YES_NO_SHARE * (yes + no):
        text = f"{yes} answers are yes, {no} are no"
        yield Finding(code="yes_no_skew", file=gathered.files[0], text=text)


def _answers(gathered: Gathered) -> Iterator[Finding]:
    answers = np.asarray(gathered.answer, dtype=np.uint64)
    answers = answers[answers != 0]
    if len(answers) >= FEW_RECORDS and (answers == answers[0]).all():
        text = f"all {len(answers)} records have the same answer"
        yield Finding(code="answers_all_same", file=gathered.files[0], text=text)
        return
    hashes, of = (np.asarray(values, dtype=np.uint64) for values in (gathered.long_answers, gathered.long_answers_of))
    values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    least = max(SAME_ANSWER_RECORDS, SAME_ANSWER_SHARE * len(gathered.ids))
    for number in np.flatnonzero(counts >= least).tolist():
        records = np.unique(of[inverse == number])
        if len(records) >= least and values[number]:
            text = f"an answer here is that of {len(records) - 1} other records too"
            yield gathered.finding(int(records[0]), "answer_everywhere", text)


def _place(gathered: Gathered, record: int) -> str:
    return gathered.finding(record, "id_duplicate", "").place


def picture_findings(gathered: Gathered, held_out: Gathered | None, pictures: Sequence[Picture]) -> Iterator[Finding]:
    """Yield that there are few pictures; and those there twice, or in the held-out set too, with their first record."""
    different = {pictures[number].content or -1 - number for number in gathered.pictures}
    if len(gathered.ids) >= FEW_RECORDS and (text := few_pictures(len(different))):
        yield Finding(code="few_pictures", file=gathered.files[0], text=text)
    names = _Shown(gathered, held_out)
    same = dict(repeated([picture.content for picture in pictures]))
    for number, first in same.items():
        both = names.record[number], names.record[first]
        if both[0] is not None and both[1] is not None:
            yield gathered.finding(both[0], "picture_duplicate", f"its file is that of {_place(gathered, both[1])}")
    groups: dict[int, list[int]] = {}
    for number, picture in enumerate(pictures):
        if picture.content:
            groups.setdefault(picture.content, []).append(number)
    for members in groups.values():
        yield from names.leak(members, members, "leak_picture", "the picture is also that of")
    shown = [number for number, picture in enumerate(pictures) if picture.thumb]
    gradients = np.array([pictures[number].gradient for number in shown], dtype=np.uint64)
    thumbs = np.frombuffer(b"".join(pictures[number].thumb for number in shown), dtype=np.uint8)
    for later, earlier in look_alike(gradients, thumbs.reshape(-1, 3 * THUMB**2)).items():
        later, earlier = shown[later], shown[earlier]
        if pictures[later].content == pictures[earlier].content:
            continue
        record, other = names.record[later], names.record[earlier]
        if record is not None and other is not None:
            text = f"the picture looks like that of {_place(gathered, other)}"
            yield gathered.finding(record, "picture_near_duplicate", text, "image")
        else:
            yield from names.leak([earlier], [later], "leak_near_picture", "the picture looks like that of")


class _Shown:
    """Which record shows a picture first, in the data and in the held-out set."""

    def __init__(self, gathered: Gathered, held_out: Gathered | None) -> None:
        self.gathered, self.held_out = gathered, held_out
        self.record = _FirstRecords(gathered)
        self.held = _FirstRecords(held_out) if held_out else None

    def leak(self, ours: Sequence[int], theirs: Sequence[int], code: str, text: str) -> Iterator[Finding]:
        """Yield that a picture of ours is one of theirs."""
        if not self.held or not self.held_out:
            return
        record = next((one for number in ours if (one := self.record[number]) is not None), None)
        other = next((one for number in theirs if (one := self.held[number]) is not None), None)
        if record is not None and other is not None:
            yield self.gathered.finding(record, code, f"{text} {_place(self.held_out, other)}", "image")


class _FirstRecords:
    def __init__(self, gathered: Gathered) -> None:
        self._first: dict[int, int] = {}
        start = 0
        for record, end in enumerate(gathered.picture_ends):
            for number in gathered.pictures[start:end]:
                self._first.setdefault(number, record)
            start = end

    def __getitem__(self, picture: int) -> int | None:
        return self._first.get(picture)


def leaked_records(gathered: Gathered, held_out: Gathered) -> Iterator[Finding]:
    """Yield records that are in the held-out set too, but for capitals, spaces and punctuation."""
    theirs = {value: record for record, value in reversed([*enumerate(held_out.alike)]) if value}
    for record, value in enumerate(gathered.alike):
        if value in theirs:
            yield gathered.finding(record, "leak_record", f"as {_place(held_out, theirs[value])}")
