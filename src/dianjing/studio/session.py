"""The review of one data file as the page sees it: records with findings and decisions, navigation, changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image

from dianjing.check.codes import CODES, Finding
from dianjing.data.record import Place
from dianjing.errors import DataError
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.studio.export import export, reviewed_path
from dianjing.studio.findings import BackgroundCheck, findings_of
from dianjing.studio.records import RecordFile, images_of, messages_of, with_messages
from dianjing.studio.review import Op, Review

Filter = Literal["all", "findings", "undecided", "accepted", "rejected"]
FILTERS: tuple[Filter, ...] = get_args(Filter)


class ReviewSession:
    """One data file under review.

    Raises:
        DataError: the file, its journal or its image folder cannot be used.
    """

    def __init__(self, data: Path, images: str, rule: PictureRule = PLAIN) -> None:
        self.data = data
        self.root = images or str(data.parent)
        self.rule = rule
        if not Path(self.root).is_dir():
            raise DataError(f"{self.root}: no such image folder; name it (--images)")
        self.records = RecordFile(str(data))
        self.journal = data.with_name(f"{data.stem}.review.jsonl")
        self.review = Review(self.journal, self.records.sha256, len(self.records))
        self.check = BackgroundCheck(str(data), self.root, rule)
        self._exporting = threading.Lock()

    def close(self) -> None:
        """End the check and give the journal back."""
        self.check.end()
        self.review.close()
        self.records.close()

    def state(self) -> dict[str, Any]:
        """Return how far the review is."""
        with_findings = len(self.check.by_record)
        counts = {"all": len(self.records), "findings": with_findings, **self.review.counts()}
        return {
            "counts": counts,
            "check": {"state": self.check.state, "progress": self.check.progress},
            "pictures_refused": self.check.pictures_refused,
            "whole": [_finding_json(finding) for finding in self.check.whole],
        }

    def fields(self, index: int) -> dict[str, Any] | None:
        """Return a record as it is now, edits included; None when it is not a JSON object."""
        raw, edited = self.records[index].fields, self.review.decision(index).conversations
        if raw is None:
            return None
        return dict(raw) if edited is None else with_messages(raw, edited)

    def place(self, index: int) -> Place:
        """Return where a record stands, for messages."""
        return Place(str(self.data), index, 0)

    def record(self, index: int) -> dict[str, Any]:
        """Return a record with all that is known about it."""
        raw, decision = self.records[index], self.review.decision(index)
        fields = self.fields(index)
        messages = None if fields is None else messages_of(fields)
        images = [] if fields is None else images_of(fields)
        return {
            "index": index,
            "id": str(index if fields is None or fields.get("id") is None else fields["id"]),
            "version": self.review.version(index),
            "status": decision.status,
            "edited": decision.conversations is not None,
            "can_undo": self.review.can_undo(index),
            "can_edit": fields is not None,
            "messages": messages,
            "raw": "" if messages is not None else raw.text,
            "images": images,
            "findings": [_finding_json(finding) for finding in self._findings(index, fields, images)],
            "changed_on_disk": self.records.changed(),
        }

    def next(self, start: int, step: int, chosen: Filter) -> dict[str, Any]:
        """Return the first record of a filter from `start` on, forwards or backwards, and where it stands in it."""
        number = len(self.records)
        decided = self.review.members("accepted") | self.review.members("rejected")
        members = {
            "findings": lambda: set(self.check.by_record),
            "accepted": lambda: self.review.members("accepted"),
            "rejected": lambda: self.review.members("rejected"),
        }.get(chosen, set)()

        def belongs(index: int) -> bool:
            return chosen == "all" or (index not in decided if chosen == "undecided" else index in members)

        way = range(start, number) if step > 0 else range(min(start, number - 1), -1, -1)
        found = next((index for index in way if belongs(index)), None)
        if chosen == "all":
            total, position = number, found
        elif chosen == "undecided":
            total = number - len(decided)
            position = None if found is None else found - sum(index < found for index in decided)
        else:
            total = len(members)
            position = None if found is None else sum(index < found for index in members)
        return {"index": found, "position": position, "total": total}

    def change(self, index: int, version: int, op: Op, conversations: object = None) -> None:
        """Make one change of a record.

        Raises:
            Stale, Unusable: as `Review.change`.
            DataError: the data file was changed on disk.
        """
        if self.records.changed():
            raise DataError(f"{self.data}: it has changed on disk since the studio was started; start the studio again")
        if op == "edit" and self.records[index].fields is None:
            raise DataError("this record is not a JSON object; fix it in the file, or reject it")
        self.review.change(index, version, op, conversations)

    def picture(self, index: int, number: int) -> Image.Image:
        """Return a picture of a record, opened as carefully as for training.

        Raises:
            DataError: the record has no such picture, or it cannot be opened.
        """
        return load_image(self.root, self.picture_name(index, number), self.rule)

    def picture_name(self, index: int, number: int) -> str:
        """Return the name of a picture of a record.

        Raises:
            DataError: the record has fewer.
        """
        images = images_of(self.fields(index) or {})
        if not 0 <= number < len(images):
            raise DataError(f"record {index} has no picture {number}")
        return images[number]

    def export(self) -> dict[str, Any]:
        """Write the reviewed set next to the data; return its name and the counts.

        Raises:
            DataError: another file has its name, or the data was changed on disk.
        """
        if self.records.changed():
            raise DataError(f"{self.data}: it has changed on disk since the studio was started; start the studio again")
        out = reviewed_path(self.data)
        with self._exporting:
            return {"file": str(out), "counts": export(self.records, self.review, out)}

    def _findings(self, index: int, fields: Mapping[str, Any] | None, images: list[str]) -> list[Finding]:
        """Return what is wrong with a record as it is now; if not edited, also in comparison with the others."""
        if fields is None:
            problem = self.records[index].problem
            return [Finding(code="not_a_record", file=str(self.data), text=problem, record=index)]
        alone = findings_of(fields, self.place(index), self.root, images, self.rule)
        if self.review.decision(index).conversations is not None:
            return alone
        known = self.check.by_record.get(index, [])
        return known + [finding for finding in alone if finding.code not in {one.code for one in known}]


def _finding_json(finding: Finding) -> dict[str, str]:
    about = CODES[finding.code]
    fix = "" if about.fix == "-" else about.fix
    return {"code": finding.code, "severity": about.severity, "text": finding.text, "fix": fix}
