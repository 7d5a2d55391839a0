"""Data sets of other layouts -> LLaVA JSON with its pictures as files."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from dianjing.check.fixes import corrected
from dianjing.check.layouts import NAMES, Converting, Source, converted_rows, layout_of
from dianjing.check.rows import rows
from dianjing.constants import IMAGE_MARKER
from dianjing.data.read import Place, is_lines
from dianjing.data.record import examine
from dianjing.errors import DataError
from dianjing.pictures.picture import SUFFIXES, PictureError, open_picture, picture_path

REASONS_SHOWN = 5
DONE = {
    "marker_foreign": "records in which <image> stands for another program's mark",
    "marker_missing": "records whose pictures were put in front of the first question",
    "picture_in_text": "records whose pictures stood in their questions",
}
"""Codes of changes that are counted -> the words for it."""
_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(kw_only=True)
class Converted:
    """The files written, with counts."""

    layout: str
    """The layout that was recognised."""
    out: Path
    images: Path
    records: int = 0
    pictures: int = 0
    left_out: list[str] = field(default_factory=list[str])
    """One reason a record that could not be converted."""
    notices: Counter[str] = field(default_factory=Counter[str])
    """Changes made to records -> how often."""


def convert(path: str, out: str, images: str) -> Converted:
    """Write the records of a file as LLaVA JSON to `out`, and their pictures into a folder next to it.

    `images` is the folder that picture paths of the file are relative to; "" = its own.

    Raises:
        ConfigError: a package is needed to read it, and is not there.
        DataError: the file cannot be read, or its layout is not known.
    """
    target = Path(out)
    if is_lines(out) or not target.parent.is_dir():
        raise DataError(f"{out}: name a .json file in a folder that exists")
    if os.path.isfile(path) and target.exists() and os.path.samefile(target, path):
        raise DataError(f"{out}: this is the data file itself, which is never changed; name another file")
    found = rows(path)
    first = next(found, None)
    if first is None:
        raise DataError(f"{path}: there is no record in it")
    try:
        layout = layout_of(first[1])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    _require_another(path, *first)
    converted = Converted(layout=layout, out=target, images=target.with_name(f"{target.stem}_images"))
    store = _Pictures(converted.images, images or (path if os.path.isdir(path) else os.path.dirname(path)) or ".")
    writing = Path(f"{out}.writing")
    try:
        with writing.open("w", encoding="utf-8") as file:
            for place, value in (row for group in ([first], found) for row in group):
                try:
                    records = list(_records(place, value, store, converted.notices))
                except DataError as error:
                    converted.left_out.append(f"{place}: {error}")
                    continue
                for record in records:
                    file.write(("," if converted.records else "[") + "\n" + json.dumps(record, ensure_ascii=False))
                    converted.records += 1
            file.write("\n]\n" if converted.records else "[]\n")
        writing.replace(target)
    finally:
        writing.unlink(missing_ok=True)
    converted.pictures = len(store.names)
    return converted


def _require_another(path: str, place: Place, row: Mapping[str, object]) -> None:
    """Refuse LLaVA JSON, which is checked and corrected as it is."""
    picture = row.get("image")
    to_store = isinstance(picture, str) and picture.startswith("data:")
    foreign = to_store or "images" in row
    if path.lower().endswith((".json", ".jsonl")) and not foreign and examine(row, place).record:
        raise DataError(f"{path}: this is LLaVA JSON already; check it, and correct it with --fix")


def _records(
    place: Place, value: Mapping[str, object], store: _Pictures, notices: Counter[str]
) -> Iterator[dict[str, object]]:
    """Yield the records of a row as LLaVA has them, their pictures stored.

    Raises:
        DataError: one could not be trained on, or one of its pictures cannot be read.
    """
    name = next((str(value[key]) for key in NAMES if value.get(key) is not None), str(place.index))
    for row in converted_rows(name, value, notices):
        yield _record(place, row, store, notices)


def _record(place: Place, row: Converting, store: _Pictures, notices: Counter[str]) -> dict[str, object]:
    stand_ins = [str(number) for number in range(len(row.pictures))]
    draft, changes = corrected({"id": row.id, "image": stand_ins, "conversations": row.messages}, place.index)
    messages = cast(list[dict[str, object]], draft["conversations"])
    named = cast(list[str], [draft["image"]] if isinstance(draft["image"], str) else draft["image"])
    pictures = [row.pictures[int(number)] for number in named] if row.pictures else cast(list[Source], named)
    done = {change.code for change in changes}
    asked = next((one for one in messages if one["from"] == "human"), None)
    if len(pictures) > 1 and asked and not any(IMAGE_MARKER in str(one["value"]) for one in messages):
        asked["value"] = f"{IMAGE_MARKER}\n" * len(pictures) + str(asked["value"])
        done.add("marker_missing")
    notices.update(DONE[code] for code in done & DONE.keys())
    record = {"id": row.id, "conversations": messages, **row.fields}
    examined = examine({**record, "image": [str(number) for number in range(len(pictures))] or None}, place)
    if examined.problems:
        raise examined.problems[0]
    names = [store.save(picture) for picture in pictures]
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    return record


class _Pictures:
    """The folder that pictures are written into, each once, named by its content."""

    def __init__(self, folder: Path, root: str) -> None:
        self._folder = folder
        self._root = root
        self.names: set[str] = set()

    def save(self, source: str | bytes) -> str:
        """Write a picture and return its path, relative to the folder of the JSON file.

        Raises:
            DataError: it is none, or it lies outside the folder that may be read.
        """
        data = self._bytes(source)
        stem = hashlib.blake2b(data, digest_size=16).hexdigest()
        self._folder.mkdir(exist_ok=True)
        writing = self._folder / f"{stem}.writing"
        writing.write_bytes(data)
        try:
            with open_picture(str(writing), "of this record") as image:
                kind = image.format or ""
                name = stem + SUFFIXES["JPEG" if kind == "MPO" else kind][0]  # MPO: a phone's JPEG of several pictures
            writing.replace(self._folder / name)
        except PictureError:
            writing.unlink()
            raise
        self.names.add(name)
        return f"{self._folder.name}/{name}"

    def _bytes(self, source: str | bytes) -> bytes:
        if isinstance(source, bytes):
            return source
        uri = _DATA_URI.match(source[:100])
        if not uri:
            return Path(picture_path(self._root, source)).read_bytes()
        try:
            return base64.b64decode(source[uri.end() :], validate=True)
        except binascii.Error:
            raise DataError("a data URI is not base64") from None
