"""A picture path that leads nowhere -> the file that was meant."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property

SAME_LETTERS = "the same name in another Unicode form, as macOS and Linux write it"
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
        """Return the path in the folder that is most like a missing one, in quotes; "" when none is."""
        slashed = name.replace("\\", "/")
        base = slashed.rpartition("/")[2]
        if (same := self._spelt_otherwise(base)) or (same := self._by_end(slashed)):
            return same
        same = self._by_stem.get(os.path.splitext(base)[0].lower(), "")
        if same or self._looked_up >= CLOSE_LOOKUPS:
            return f'"{same}"' if same else ""
        self._looked_up += 1
        folder = "" if os.path.isabs(slashed) or slashed[1:2] == ":" else os.path.dirname(slashed)
        found = difflib.get_close_matches(base, self._listed(folder), n=1, cutoff=0.75)
        return f'"{os.path.join(folder, found[0])}"' if found else ""

    def _spelt_otherwise(self, base: str) -> str:
        """Return the file whose name is the same text in other bytes, in quotes, and how it came to be so."""
        for spelling, asked in _spellings(base):
            found = self._by_spelling.get(spelling, "")
            if found and os.path.basename(found) != base:
                stored = next(why for other, why in _spellings(os.path.basename(found)) if other == spelling)
                return f'"{found}" ({asked if stored == SAME_LETTERS else stored})'
        return ""

    def _by_end(self, name: str) -> str:
        """Return the file with the longest end of its path in common with an absolute path, in quotes."""
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((end for end in ends if self._has(end)), "")
        return f'"{found}"' if found else ""

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
    def _by_spelling(self) -> dict[str, str]:
        pairs = {(spelling, name) for name in self._files for spelling, _ in _spellings(os.path.basename(name))}
        return _unambiguous(sorted(pairs))

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        return _unambiguous((os.path.splitext(os.path.basename(name))[0].lower(), name) for name in self._files)


def _spellings(name: str) -> Iterator[tuple[str, str]]:
    """Yield the texts that a name stands for if it went through another normal form or code page, and which."""
    yield unicodedata.normalize("NFC", name), SAME_LETTERS
    for page in ("cp437", "latin-1", "cp1252"):
        for encoding in ("utf-8", "gb18030"):
            with suppress(UnicodeError):
                text = name.encode(page).decode(encoding)
                if text != name:
                    yield text, f"the same name unpacked from a ZIP in the wrong code page, {page} for {encoding}"
    with suppress(UnicodeError):
        text = os.fsencode(name).decode("gb18030")
        if text != name and not _is_utf8(name):
            yield text, "the same name in GB18030 (GBK) bytes"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, which Python keeps as lone surrogates
        return False
    return True


def _unambiguous(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return key -> value, "" where several values share a key."""
    found: dict[str, str] = {}
    for key, value in pairs:
        found[key] = "" if key in found else value
    return found
