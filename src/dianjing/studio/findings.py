"""Findings of the check for the shown record: those of the whole set from the background, those of an edit at once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dianjing.check.check import Settings, check
from dianjing.check.chunk import ChunkResult, Where, add_record
from dianjing.check.codes import Finding
from dianjing.check.pictures import PictureChecker
from dianjing.data.record import NOTICES, Place, examine
from dianjing.errors import DianjingError
from dianjing.pictures.rule import PictureRule


def findings_of(
    fields: Mapping[str, Any], place: Place, root: str, images: Sequence[str], rule: PictureRule
) -> list[Finding]:
    """Return what is wrong with one record by itself, its pictures included."""
    examined = examine(dict(fields), place)
    where = Where(place.source, place.index, examined.id, place.line)
    found = [where.finding(one.code, str(one), one.field) for one in examined.problems]
    if not examined.problems:
        found += [where.finding(code, NOTICES[code]) for code in examined.noticed]
    result = ChunkResult()
    add_record(result, where, examined.record, ())
    found += result.findings
    for name, picture in zip(images, PictureChecker(root, rule)(images), strict=True):
        if picture.code:
            found.append(where.finding(picture.code, picture.text, "image"))
        found += [where.finding(code, f'picture "{name}": {text}', "image") for code, text in picture.notes]
    return found


class _Ended(Exception):
    """The studio ends before the check does."""


class BackgroundCheck:
    """A check of the whole set that goes on while records are looked at."""

    def __init__(self, path: str, images: str, rule: PictureRule) -> None:
        self.state: str = "running"
        """"running", "done", or why it ended otherwise."""
        self.progress = ""
        self.by_record: dict[int, list[Finding]] = {}
        self.whole: list[Finding] = []
        """Findings that are not about a single record."""
        self.pictures_refused = 0
        """Of all records; none of them was opened by its path."""
        self._settings = Settings(paths=(path,), images=images, rule=rule)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop, if it still runs, and wait until it has."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            result = check(self._settings, self._watch)
        except _Ended:
            self.state = "ended"
        except (DianjingError, OSError) as error:
            self.state = str(error)
        else:
            found: defaultdict[int, list[Finding]] = defaultdict(list)
            for code in result.findings.codes():
                for finding in result.findings.of(code):
                    if finding.record is None:
                        self.whole.append(finding)
                    else:
                        found[finding.record].append(finding)
            self.by_record = dict(found)
            refused = ("path_absolute", "path_outside", "path_url")
            self.pictures_refused = sum(result.findings.counts[code] for code in refused)
            self.state = "done"

    def _watch(self, name: str, done: int, total: int) -> None:
        if self._ending.is_set():
            raise _Ended
        self.progress = f"{name}: {done:,} / {total:,}"
