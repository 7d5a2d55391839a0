"""A picture path that leads nowhere -> the file that was meant."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from functools import cached_property

CLOSE_LOOKUPS = 200
"""Names for which the most alike one of their folder is looked for, which is slow."""
MAX_LISTED = 20_000


class Folder:
    """The picture folder, listed once it is asked about; nothing outside it is looked at."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._looked_up = 0

    def certain(self, code: str, name: str) -> tuple[str, str] | None:
        """Return (code, path) when there is no doubt which file a path means, whose fault has this code."""
        if code == "path_absolute":
            inside = os.path.relpath(os.path.normpath(name), self._root)
            if not inside.startswith("..") and self._has(inside):
                return code, inside.replace(os.sep, "/")
            return None
        if code != "picture_missing":
            return None
        slashed = name.replace("\\", "/")
        if slashed != name and self._has(slashed):
            return "path_backslash", slashed
        other = self._by_lower.get(os.path.normpath(slashed).lower(), "")
        return ("picture_case", other) if other else None

    def nearest(self, name: str) -> str:
        """Return the path in the folder that is most like a missing one; "" when none is."""
        base = name.replace("\\", "/").rpartition("/")[2]
        same = self._by_stem.get(os.path.splitext(base)[0].lower(), "")
        if same or self._looked_up >= CLOSE_LOOKUPS:
            return same
        self._looked_up += 1
        folder = os.path.dirname(name)
        found = difflib.get_close_matches(base, self._listed(folder), n=1, cutoff=0.75)
        return os.path.join(folder, found[0]) if found else ""

    def _has(self, name: str) -> bool:
        path = os.path.realpath(os.path.join(self._root, name))
        return os.path.commonpath([self._root, path]) == self._root and os.path.isfile(path)

    def _listed(self, folder: str) -> list[str]:
        prefix = os.path.normpath(folder) + "/" if folder else ""
        inside = [name for name in self._files if name.startswith(prefix) and "/" not in name[len(prefix) :]]
        return [name[len(prefix) :] for name in inside[:MAX_LISTED]]

    @cached_property
    def _files(self) -> list[str]:
        return [
            os.path.relpath(os.path.join(folder, file), self._root).replace(os.sep, "/")
            for folder, _, files in os.walk(self._root)
            for file in files
        ]

    @cached_property
    def _by_lower(self) -> dict[str, str]:
        return _unambiguous((name.lower(), name) for name in self._files)

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        return _unambiguous((os.path.splitext(os.path.basename(name))[0].lower(), name) for name in self._files)


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return key -> value, "" where several values share a key."""
    found: dict[str, str] = {}
    for key, value in pairs:
        found[key] = "" if key in found else value
    return found
