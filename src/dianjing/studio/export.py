"""Source and decisions -> a new data file; the source is only read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dianjing.data.record import Place, examine
from dianjing.errors import DataError
from dianjing.studio.records import RecordFile, encodable, with_messages
from dianjing.studio.review import Review


def reviewed_path(data: Path) -> Path:
    """Return where the reviewed set of a data file goes."""
    return data.with_name(f"{data.stem}.reviewed.json")


def export(records: RecordFile, review: Review, out: Path) -> dict[str, int]:
    """Write every record that is not rejected, edits in place, and return what was written and left out.

    Raises:
        DataError: a file that was not written here, or was changed since, stands in the way.
    """
    if out.exists() and _sha256(out) not in review.exports:
        raise DataError(f"{out}: it was not written by the studio, or was changed since; move it away")
    counts: Counter[str] = Counter(
        {name: 0 for name in ("written", "accepted", "edited", "undecided", "rejected", "unreadable", "with_errors")}
    )
    aside = out.with_name(f".{out.name}.tmp")
    aside.unlink(missing_ok=True)  # a link that stands there is not followed
    with open(aside, "x", encoding="utf-8") as file:
        mark = "[\n"
        for fields in _kept(records, review, counts):
            text = json.dumps(fields, ensure_ascii=False)
            file.write(mark + (text if encodable(text) else json.dumps(fields)))
            mark = ",\n"
        file.write("[]\n" if mark == "[\n" else "\n]\n")
        file.flush()
        os.fsync(file.fileno())
    review.exported(_sha256(aside))
    os.replace(aside, out)
    return dict(counts)


def _kept(records: RecordFile, review: Review, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for index, raw in enumerate(records):
        decision = review.decision(index)
        if decision.status == "rejected":
            counts["rejected"] += 1
        elif raw.fields is None:
            counts["unreadable"] += 1
        else:
            edited = decision.conversations
            fields = dict(raw.fields) if edited is None else with_messages(raw.fields, edited)
            counts["written"] += 1
            counts[decision.status] += 1
            counts["edited"] += edited is not None
            counts["with_errors"] += bool(examine(fields, Place(records.path, index, 0)).problems)
            yield fields


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
