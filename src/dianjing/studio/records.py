"""A data file of any size -> one record at a time, read from disk when it is asked for."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dianjing.check.fixes import read_value
from dianjing.data.read import is_lines
from dianjing.data.split import MAX_RECORD_BYTES, Flaw, mapped, split
from dianjing.errors import DataError

RAW_CHARACTERS = 20_000
"""Shown of a record that is not a conversation."""
MAX_PICTURES = 16
"""Shown of one record."""

Message = Mapping[str, str]
"""{"from": "human" or "gpt", "value": text}, as in the file."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """A record as it stands in the file."""

    text: str
    fields: Mapping[str, Any] | None
    """None if it is not a JSON object."""
    problem: str = ""
    """Why it is not one."""


class RecordFile:
    """The records of one data file, by their number.

    Raises:
        DataError: the file cannot be read, or holds no record.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._starts, self._ends = array("Q"), array("Q")
        lines = is_lines(path)
        try:
            self._file = os.open(path, os.O_RDONLY)
            self._state = _state(os.fstat(self._file))
            with mapped(path) as data:
                self.sha256 = hashlib.sha256(data).hexdigest()
                for found in split(data, lines=lines):
                    if not isinstance(found, Flaw):
                        self._starts.append(found[0])
                        self._ends.append(found[1])
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); give a LLaVA JSON or JSONL file") from None
        if not self._starts:
            raise DataError(f"{path}: it holds no record")

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Raw]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Raw:
        start, end = self._starts[index], self._ends[index]
        if end - start > MAX_RECORD_BYTES:
            return Raw(text="", fields=None, problem=f"{(end - start) >> 20} MB in one record, which are not read")
        content = os.pread(self._file, end - start, start)
        try:
            text = content.decode()
            value, _ = read_value(text)
        except (ValueError, RecursionError) as error:
            return Raw(text=_shown(content.decode(errors="replace")), fields=None, problem=f"not JSON: {error}")
        if not isinstance(value, dict):
            return Raw(text=_shown(text), fields=None, problem="not a JSON object")
        return Raw(text=_shown(text), fields=cast(dict[str, Any], value))

    def changed(self) -> bool:
        """Return whether the file on disk is another one than was opened."""
        try:
            return _state(os.stat(self.path)) != self._state
        except OSError:
            return True

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _shown(text: str) -> str:
    return text if len(text) <= RAW_CHARACTERS else text[:RAW_CHARACTERS] + " ..."


def messages_of(fields: Mapping[str, Any]) -> list[Message] | None:
    """Return the conversation of a record; None when it is not one that can be shown as messages."""
    found = fields.get("conversations", fields.get("conversation", fields.get("messages")))
    return read_messages(found)


def read_messages(value: object) -> list[Message] | None:
    """Return a JSON value as messages; None when it is anything else."""
    if not isinstance(value, list):
        return None
    messages: list[Message] = []
    for one in cast(list[object], value):
        if not isinstance(one, dict):
            return None
        fields = cast(dict[str, object], one)
        role, text = fields.get("from", fields.get("role")), fields.get("value", fields.get("content"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        messages.append({"from": role, "value": text})
    return messages


def images_of(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of a record's pictures; what is not a name is left to the findings."""
    value = fields.get("image")
    names = cast(list[object], value) if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str) and name and encodable(name)][:MAX_PICTURES]


def encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8, which half a character (a lone surrogate) cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def with_messages(fields: Mapping[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    """Return a record with another conversation.

    Its `types`, one an answer, are left out when the number of messages is another.
    """
    before = messages_of(fields) or []
    stale = {"conversation", "messages", *(["types"] if len(before) != len(messages) else [])}
    kept = {name: value for name, value in fields.items() if name not in stale}
    return {**kept, "conversations": [dict(message) for message in messages]}
