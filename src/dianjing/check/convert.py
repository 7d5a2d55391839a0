"""Data sets of other layouts -> LLaVA JSON with its pictures as files."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dianjing.check.fixes import ROLES
from dianjing.constants import IMAGE_MARKER
from dianjing.data.read import Place, is_lines
from dianjing.data.record import examine
from dianjing.data.split import MAX_RECORD_BYTES, Flaw, mapped, split
from dianjing.errors import ConfigError, DataError
from dianjing.extras import install
from dianjing.pictures.picture import SUFFIXES, PictureError, open_picture, picture_path

CAPTION_QUESTION = "Describe the picture."
CAPTION_COLUMNS = ("caption", "text", "answer")
REASONS_SHOWN = 5
ROWS_AT_ONCE = 64
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


@dataclass(kw_only=True)
class _Row:
    """A record of any layout: messages with markers, and its pictures as paths, data URIs or bytes."""

    id: str
    messages: list[dict[str, object]]
    pictures: list[str | bytes]


def convert(path: str, out: str, images: str) -> Converted:
    """Write the records of a file as LLaVA JSON to `out`, and their pictures into a folder next to it.

    `images` is the folder that picture paths of the file are relative to; "" = its own.

    Raises:
        ConfigError: parquet is to be read, and pyarrow is not there.
        DataError: the file cannot be read, or its layout is not known.
    """
    target = Path(out)
    if is_lines(out) or not target.parent.is_dir():
        raise DataError(f"{out}: name a .json file in a folder that exists")
    if target.exists() and os.path.samefile(target, path):
        raise DataError(f"{out}: this is the data file itself, which is never changed; name another file")
    rows = iter(_rows(path))
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: there is no record in it")
    layout = _layout(path, first[1])
    converted = Converted(layout=layout, out=target, images=target.with_name(f"{target.stem}_images"))
    store = _Pictures(converted.images, images or os.path.dirname(path) or ".")
    writing = Path(f"{out}.writing")
    try:
        with writing.open("w", encoding="utf-8") as file:
            for place, value in (row for group in ([first], rows) for row in group):
                try:
                    record = _record(place, value, store, converted.notices)
                except DataError as error:
                    converted.left_out.append(f"{place}: {error}")
                    continue
                file.write(("," if converted.records else "[") + "\n" + json.dumps(record, ensure_ascii=False))
                converted.records += 1
            file.write("\n]\n" if converted.records else "[]\n")
        writing.replace(target)
    finally:
        writing.unlink(missing_ok=True)
    converted.pictures = len(store.names)
    return converted


def _rows(path: str) -> Iterator[tuple[Place, Mapping[str, object]]]:
    """Yield the records of a JSON, JSONL or parquet file."""
    try:
        yield from _parquet_rows(path) if path.lower().endswith(".parquet") else _json_rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json_rows(path: str) -> Iterator[tuple[Place, Mapping[str, object]]]:
    lines = is_lines(path)
    index = 0
    with mapped(path) as data:
        for found in split(data, lines=lines):
            if isinstance(found, Flaw):
                if found.code not in ("bom", "json_not_a_list"):
                    raise DataError(f"{path}: byte {found.offset}: {found.text}; put this right first")
                continue
            start, end = found
            place = Place(path, index, 0)
            if end - start > MAX_RECORD_BYTES:
                raise DataError(f"{place}: more than {MAX_RECORD_BYTES >> 20} MB in one record; it is not parsed")
            try:
                value: object = json.loads(data[start:end])
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON: {error}") from None
            if not isinstance(value, dict):
                raise DataError(f"{place}: not an object")
            yield place, cast(dict[str, object], value)
            index += 1


def _parquet_rows(path: str) -> Iterator[tuple[Place, Mapping[str, object]]]:
    try:
        import pyarrow.parquet
        from pyarrow.lib import ArrowException
    except ImportError:
        raise ConfigError(f"{path}: parquet is read with pyarrow: {install('parquet')}") from None
    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    yield Place(path, index, 0), row
                    index += 1
    except ArrowException as error:
        raise DataError(f"{path}: not parquet that can be read: {error}") from None


def _layout(path: str, row: Mapping[str, object]) -> str:
    """Return which layout a record has."""
    if path.lower().endswith(".parquet"):
        if any(key in row for key in ("conversations", "messages", "texts", *CAPTION_COLUMNS)):
            return "parquet"
    elif "messages" in row:
        return "OpenAI messages"
    elif "conversations" in row and "image" in row and "images" not in row:
        raise DataError(f"{path}: this is LLaVA JSON already; check it, and correct it with --fix")
    elif "conversations" in row:
        return "ShareGPT"
    raise DataError(
        f"{path}: its layout is not known (keys {', '.join(row)}); OpenAI messages, ShareGPT and parquet are read"
    )


def _record(place: Place, value: Mapping[str, object], store: _Pictures, notices: Counter[str]) -> dict[str, object]:
    """Return a record as LLaVA has it, its pictures stored.

    Raises:
        DataError: it is none that could be trained on, or one of its pictures cannot be read.
    """
    row = _row(place, value, notices)
    markers = sum(str(one["value"]).count(IMAGE_MARKER) for one in row.messages if one["from"] == "human")
    asked = next((one for one in row.messages if one["from"] == "human"), None)
    if row.pictures and not markers and asked:
        asked["value"] = f"{IMAGE_MARKER}\n" * len(row.pictures) + str(asked["value"])
        notices["records whose pictures were put in front of the first question"] += 1
    record: dict[str, object] = {"id": row.id, "conversations": row.messages}
    stand_ins = [str(number) for number in range(len(row.pictures))]
    examined = examine({**record, "image": stand_ins or None}, place)
    if examined.problems:
        raise examined.problems[0]
    names = [store.save(picture) for picture in row.pictures]
    if names:
        record["image"] = names[0] if len(names) == 1 else names
    return record


def _row(place: Place, value: Mapping[str, object], notices: Counter[str]) -> _Row:
    row = _Row(id=str(value.get("id") or place.index), messages=[], pictures=[])
    for key in ("image", "images"):
        row.pictures += _sources(value.get(key))
    messages = value.get("messages", value.get("conversations"))
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        for message in cast(Sequence[Any], messages):
            if not isinstance(message, dict):
                raise DataError("a message is not an object")
            _add_message(row, cast(dict[str, object], message), notices)
    elif isinstance(value.get("texts"), Sequence):
        for pair in cast(Sequence[Mapping[str, object]], value["texts"]):
            for role in ("user", "assistant"):
                _add_message(row, {"role": role, "content": pair.get(role)}, notices)
    else:
        caption = next((value[key] for key in CAPTION_COLUMNS if isinstance(value.get(key), str)), None)
        if caption is None:
            raise DataError("it has neither messages nor a caption")
        notices[f'captions, asked for with "{CAPTION_QUESTION}"'] += 1
        row.messages = [{"from": "human", "value": CAPTION_QUESTION}, {"from": "gpt", "value": caption}]
    return row


def _add_message(row: _Row, message: Mapping[str, object], notices: Counter[str]) -> None:
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.lower(), said) if isinstance(said, str) else said
    if role == "system":
        notices["system messages left out: LLaVA JSON has none"] += 1
        return
    content = message.get("content", message.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(row, part) for part in cast(Sequence[Any], content))
    row.messages.append({"from": role, "value": content})


def _part(row: _Row, part: object) -> str:
    """Return a part of a message as text; a picture is added to the row's."""
    fields = cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind in ("text", "input_text", "output_text"):
        return str(fields.get("text") or "")
    source = fields.get("image_url") if kind in ("image_url", "input_image") else fields.get("image")
    if kind not in ("image_url", "input_image", "image"):
        raise DataError(f'a part of a message is of the type "{kind}"; text and pictures are read')
    if isinstance(source, Mapping):
        source = cast(Mapping[str, object], source).get("url", source)
    found = _sources(source)
    row.pictures += found
    return f"{IMAGE_MARKER}\n" * len(found)


def _sources(value: object) -> list[str | bytes]:
    """Return the pictures that a field names: a path, a data URI, bytes, Hugging Face's struct, or a list of them."""
    if value is None:
        return []
    if isinstance(value, str | bytes):
        return [value]
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        return _sources(fields.get("bytes") or fields.get("path") or fields.get("url"))
    if isinstance(value, Iterable):
        return [source for one in cast(Iterable[object], value) for source in _sources(one)]
    raise DataError("a picture is neither a path nor bytes")


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
                name = stem + SUFFIXES[image.format or ""][0]
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
