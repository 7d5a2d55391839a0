"""Pictures that are all missing -> the folder in which they lie, if it is near."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

NAMES = 20
"""Names that are looked for."""
FOLDERS = 500
"""Folders that are looked into, next to the data file and one above."""


def nearby_folder(data: str, messages: Sequence[str]) -> str:
    """Return the folder near a data file that holds the pictures of these messages, "" if none does."""
    found = (re.match(r'picture "(.+?)":', message) for message in messages[:NAMES])
    names = [match[1] for match in found if match]
    start = Path(data).resolve().parent
    for folder in islice(_folders(start), FOLDERS):
        if names and all((folder / name).is_file() for name in names):
            return os.path.relpath(folder)
    return ""


def _folders(start: Path) -> Iterator[Path]:
    for folder in (start, start.parent):
        yield folder
        try:
            inside = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
        except OSError:
            continue
        yield from map(Path, inside)
