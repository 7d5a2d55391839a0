"""The journal: one line for every call and every reply, on disk before anything else happens.

    {"status": "sent", "key": ..., "image": "cat.jpg", "prompt": "caption_en"}       before a call
    {"status": "ok" | "invalid" | "refused" | "failed", "key": ..., ...}              what came of it

A `sent` without an outcome was under way when a run was killed: it alone is asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from dianjing.journal import JournalFile

Status = Literal["ok", "invalid", "refused", "failed"]
FORMAT = {"journal": "dianjing make", "version": 1}
MAX_INVALID = 2
"""A reply that cannot be used is asked for once more; a second one is the end of it."""
NO_ANSWER = ("timeout", "connection")
"""How the reasons of failures begin after which nobody knows whether the call was paid for."""


@dataclass(kw_only=True)
class Entry:
    """The state of one request, by the journal."""

    status: Status | None = None
    """Of the last outcome; None if there is none."""
    reply: str = ""
    """The last one received."""
    reason: str = ""
    """Why it is not ok."""
    invalid: list[tuple[str, str]] = field(default_factory=list)
    """Replies that cannot be used, with what was wrong with each."""

    @property
    def settled(self) -> bool:
        """Return whether the request has an answer that was paid for and will not change."""
        return self.status in ("ok", "refused") or len(self.invalid) >= MAX_INVALID


@dataclass
class Usage:
    """Tokens that replies of one prompt took."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    most_prompt_tokens: int = 0
    """Of one reply."""


@dataclass(kw_only=True)
class Totals:
    """The totals of all runs on this journal: sent, received and paid."""

    calls: int = 0
    """Sent in all, those that failed or got no answer included."""
    unanswered: int = 0
    """Sent and without an answer: under way (now, or when a run was killed), timed out, or cut off.

    Only these can have been paid for without an answer in the journal, and paid for again.
    """
    statuses: Counter[str] = field(default_factory=Counter)
    cost: float = 0.0
    unpriced: Usage = field(default_factory=Usage)
    """Of replies written by a run that was given no prices."""
    usage: dict[str, Usage] = field(default_factory=dict)
    """By prompt."""


class Journal:
    """The journal of one output file; while entered it is locked, and can be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.totals = Totals()
        self._file = JournalFile(path, FORMAT, "give another --out")

    def __enter__(self) -> Journal:
        """Lock and read the journal.

        Raises:
            DataError: another run has it open, or it is not a journal.
        """
        self._file.open(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> None:
        """Take in what is on disk, if anything is; the call of a torn last line counts as without an answer.

        Raises:
            DataError: a line that is not the last is not a JSON object.
        """
        self._file.read(self._take)

    def entry(self, key: str) -> Entry:
        """Return what is known of a request."""
        return self.entries.get(key) or Entry()

    def sent(self, key: str, about: Mapping[str, object]) -> None:
        """Write that a call is about to be made."""
        self._write({"status": "sent", "key": key, **about})

    def received(self, key: str, status: Status, fields: Mapping[str, object]) -> None:
        """Write what came of a call."""
        self._write({"status": status, "key": key, **fields})

    def _write(self, fields: dict[str, Any]) -> None:
        self._file.append(fields)
        self._take(fields)

    def _take(self, fields: dict[str, Any]) -> None:
        entry = self.entries.setdefault(fields["key"], Entry())
        status = cast("Status | Literal['sent']", fields["status"])
        if status == "sent":
            self.totals.calls += 1
            self.totals.unanswered += 1
            return
        entry.status, entry.reason, entry.reply = status, fields.get("reason", ""), fields.get("reply", "")
        if status == "invalid":
            entry.invalid.append((entry.reply, entry.reason))
        self._count(status, fields)

    def _count(self, status: Status, fields: Mapping[str, Any]) -> None:
        """Add one outcome to the totals."""
        totals = self.totals
        totals.statuses[status] += 1
        answered = not (status == "failed" and fields["reason"].startswith(NO_ANSWER))
        totals.unanswered -= answered and not fields.get("batch")
        cost, tokens = fields.get("cost"), fields.get("usage")
        totals.cost += cost or 0.0
        if tokens:
            by_prompt = totals.usage.setdefault(fields.get("prompt", ""), Usage())
            for usage in [by_prompt, *([totals.unpriced] if cost is None else [])]:
                usage.replies += 1
                usage.prompt_tokens += tokens["prompt_tokens"]
                usage.completion_tokens += tokens["completion_tokens"]
                usage.most_prompt_tokens = max(usage.most_prompt_tokens, tokens["prompt_tokens"])
