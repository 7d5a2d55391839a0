"""Decisions about records, in a journal next to the data: nothing is overwritten, undoing appends too.

    {"op": "accept" | "reject" | "edit" | "undo", "record": 17, "version": 3, "conversations": [...]}

`version` counts the lines about a record; a change names the version it was made on, so that of two tabs that change
the same one the second gets an error.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dianjing.errors import DataError
from dianjing.journal import JournalFile
from dianjing.studio.records import Message, encodable, read_messages

Status = Literal["undecided", "accepted", "rejected"]
Op = Literal["accept", "reject", "edit", "undo"]
OPS: tuple[Op, ...] = get_args(Op)
FORMAT = {"journal": "dianjing studio", "version": 1}
ROLES = ("human", "gpt")


class Stale(Exception):
    """A change was made on a version of a record that is not the present one."""


class Unusable(ValueError):
    """A change that cannot be made, and why."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision about one record."""

    status: Status = "undecided"
    conversations: Sequence[Message] | None = None
    """The conversation that replaces the file's; None if that one stands."""


UNDECIDED = Decision()


class Review:
    """All decisions about one data file.

    Raises:
        DataError: another process has the journal open, or it belongs to another data file.
    """

    def __init__(self, path: Path, sha256: str, records: int) -> None:
        self.exports: set[str] = set()
        """SHA-256 of each file that was written from this journal."""
        self._records = records
        self._data = {"op": "data", "sha256": sha256, "records": records}
        self._begun = False
        self._history: dict[int, list[Decision]] = {}
        self._versions: dict[int, int] = {}
        self._members: dict[Status, set[int]] = {"accepted": set(), "rejected": set()}
        self._lock = threading.RLock()
        self._file = JournalFile(path, FORMAT, "end the other studio")
        self._file.open(self._take)
        if not self._begun:
            self._write(self._data)

    def close(self) -> None:
        """Give the journal back."""
        self._file.close()

    def decision(self, record: int) -> Decision:
        """Return what is decided about a record."""
        return (self._history.get(record) or [UNDECIDED])[-1]

    def version(self, record: int) -> int:
        """Return how often a record was changed, undoing included."""
        return self._versions.get(record, 0)

    def can_undo(self, record: int) -> bool:
        """Return whether there is a change of a record that is not undone."""
        return bool(self._history.get(record))

    def members(self, status: Status) -> set[int]:
        """Return the accepted or the rejected records."""
        with self._lock:
            return set(self._members[status])

    def counts(self) -> dict[str, int]:
        """Return how many records have each status."""
        with self._lock:
            accepted, rejected = len(self._members["accepted"]), len(self._members["rejected"])
        return {"accepted": accepted, "rejected": rejected, "undecided": self._records - accepted - rejected}

    def change(self, record: int, version: int, op: Op, conversations: object = None) -> None:
        """Write a change of a record.

        Raises:
            Stale: the record was changed since `version`.
            Unusable: there is nothing to undo, or it is not a conversation.
        """
        with self._lock:
            if version != self.version(record):
                raise Stale
            line: dict[str, Any] = {"op": op, "record": record, "version": version + 1}
            if op == "edit":
                line["conversations"] = checked(conversations)
            if op == "undo" and not self.can_undo(record):
                raise Unusable("there is nothing to undo")
            self._write(line)

    def exported(self, sha256: str) -> None:
        """Take note of a file written from these decisions."""
        with self._lock:
            self._write({"op": "export", "sha256": sha256})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.append(line)
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if not self._begun:
            self._require_same_data(line)
            self._begun = True
        elif line["op"] == "export":
            self.exports.add(str(line["sha256"]))
        else:
            self._apply(line)

    def _require_same_data(self, line: Mapping[str, Any]) -> None:
        if line != self._data:
            raise DataError(
                f"{self._file.path}: the decisions in it are about {line['records']} records of another data file, or "
                "of this one before it was changed; put that file back, or move the journal away to start again"
            )

    def _apply(self, line: Mapping[str, Any]) -> None:
        record, op = line["record"], line["op"]
        follows = op in OPS and 0 <= record < self._records and line["version"] == self.version(record) + 1
        if not follows or (op == "undo" and not self.can_undo(record)):
            raise ValueError("it does not follow from the lines before it")
        history = self._history.setdefault(record, [])
        if op == "undo":
            history.pop()
        elif op == "edit":
            history.append(Decision(status="accepted", conversations=checked(line["conversations"])))
        else:
            status: Status = "accepted" if op == "accept" else "rejected"
            history.append(replace(self.decision(record), status=status))
        self._versions[record] = line["version"]
        for status, members in self._members.items():
            (members.add if self.decision(record).status == status else members.discard)(record)


def checked(value: object) -> list[Message]:
    """Return a conversation that was written in the editor.

    Raises:
        Unusable: it is not a list of messages from "human" and "gpt".
    """
    messages = read_messages(value)
    if not messages:
        raise Unusable("a conversation needs at least one message")
    for message in messages:
        if message["from"] not in ROLES:
            raise Unusable(f'a message is from "human" or "gpt", not from "{message["from"]}"')
        if not encodable(message["value"]):
            raise Unusable("a text holds half a character (a lone surrogate)")
    return messages
