"""A file or folder of records, in whatever format -> its records as mappings."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from dianjing.data.file_kind import LOOKED_AT, kind_of_file, likely_encoding
from dianjing.data.read import Place
from dianjing.data.split import MAX_RECORD_BYTES, Flaw, mapped, split
from dianjing.errors import ConfigError, DataError
from dianjing.extras import install

Row = tuple[Place, Mapping[str, object]]

ROWS_AT_ONCE = 64
MOST_JSON = 2**30
"""Bytes of a JSON file that is one object, which is parsed whole..."""
MOST_UNPACKED = 64 * 2**30
"""...and of a file after it is unpacked."""
BLOCK = 2**22
PACKED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
"""Suffix of a compressed file -> the bytes it begins with."""
ARROW_FILE, PARQUET = b"ARROW1", b"PAR1"
SHARDS = (".parquet", ".arrow", ".tar", ".jsonl", ".json", ".csv", ".tsv")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""The table of a Hugging Face image folder."""
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXTS = ("txt", "caption", "text")


def rows(path: str) -> Iterator[Row]:
    """Yield the records of a file, or of the files of a folder.

    Raises:
        ConfigError: a package is needed that is not installed.
        DataError: it cannot be read, or holds no records.
    """
    try:
        for file in files_of(path):
            yield from _file_rows(file, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def files_of(path: str) -> list[str]:
    """Return the files that a data set consists of.

    Raises:
        DataError: it is a folder of which nothing says what to read.
    """
    if not os.path.isdir(path):
        return [path]
    names = sorted(os.listdir(path))
    if "dataset_dict.json" in names:
        with open(os.path.join(path, "dataset_dict.json"), encoding="utf-8") as file:
            found: Any = json.load(file)
        splits = ", ".join(os.path.join(path, str(name)) for name in found.get("splits", []))
        raise DataError(f"{path}: a data set of several parts; name one of them: {splits}")
    for name in METADATA:
        if name in names:
            return [os.path.join(path, name)]
    if "state.json" in names:  # of Dataset.save_to_disk
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state: Any = json.load(file)
        return [os.path.join(path, os.path.basename(str(one["filename"]))) for one in state["_data_files"]]
    by_suffix = {suffix: [name for name in names if _unpacked(name).endswith(suffix)] for suffix in SHARDS}
    kinds = [suffix for suffix, found in by_suffix.items() if found]
    if len(kinds) == 1:
        return [os.path.join(path, name) for name in by_suffix[kinds[0]]]
    folders = [name for name in names if os.path.isdir(os.path.join(path, name))]
    what = f"several kinds of files ({', '.join(kinds)})" if kinds else "a folder without a file of records"
    inside = f"; is a folder in it meant ({', '.join(folders[:5])})?" if folders and not kinds else "; name the file"
    raise DataError(f"{path}: {what}{inside}")


def _unpacked(name: str) -> str:
    """Return a file's name in small letters, without the suffix of its compression."""
    stem, suffix = os.path.splitext(name.lower())
    return stem if suffix in PACKED else name.lower()


def _file_rows(path: str | int, shown: str) -> Iterator[Row]:
    """Yield the records of a file, which messages call `shown`."""
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        file.seek(0)
        start = file.read(LOOKED_AT)
    name = _unpacked(shown)
    packed = next((suffix for suffix, mark in PACKED.items() if start.startswith(mark)), "")
    if packed and isinstance(path, str):  # once: what is packed twice is not read
        with _unpack(path, packed) as number:
            yield from _file_rows(number, shown)
    elif start.startswith(PARQUET):
        yield from _arrow_rows(path, shown, _parquet)
    elif start.startswith((ARROW_FILE, b"\xff\xff\xff\xff")):
        yield from _arrow_rows(path, shown, _arrow_file if start.startswith(ARROW_FILE) else _arrow_stream)
    elif name.endswith(".tar"):
        yield from _tar_rows(path, shown)
    elif kind := kind_of_file(start):
        raise DataError(f"{shown}: the file is {kind}")
    elif name.endswith((".csv", ".tsv")):
        yield from _table_rows(path, shown, "\t" if name.endswith(".tsv") else ",")
    elif name.endswith((".json", ".jsonl", ".ndjson")):
        yield from _json_rows(path, shown, lines=not name.endswith(".json"))
    else:
        known = "JSON, JSONL, CSV, TSV, parquet, Arrow and tar (WebDataset), or these compressed (gz, zst, bz2, xz)"
        raise DataError(f"{shown}: not of a kind that is read: {known}, or a folder of such files")


@contextmanager
def _unpack(path: str, suffix: str) -> Iterator[int]:
    """Unpack a file into a temporary one; yield its descriptor."""
    with tempfile.TemporaryFile() as target, _opened(path, suffix) as source:
        size = 0
        try:
            while block := source.read(BLOCK):
                size += len(block)
                if size > MOST_UNPACKED:
                    raise DataError(f"{path}: unpacked it is more than {MOST_UNPACKED >> 30} GB; cut it into parts")
                target.write(block)
        except (EOFError, OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be unpacked ({error}); copy or download it again") from None
        target.flush()
        yield target.fileno()


def _opened(path: str, suffix: str) -> IO[bytes]:
    # Each module is needed for its own kind of file alone.
    if suffix == ".zst":
        return cast(IO[bytes], _pyarrow(path).input_stream(path, compression="zstd"))
    import bz2
    import gzip
    import lzma

    openers: dict[str, Callable[[str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return cast(IO[bytes], openers[suffix](path))


def _pyarrow(shown: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{shown}: read with pyarrow: {install('parquet')}") from None
    return pyarrow


def _json_rows(path: str | int, shown: str, *, lines: bool) -> Iterator[Row]:
    with mapped(path) as mapping:
        data: Any = mapping
        if encoding := _encoding(data):
            data = data[:].decode(encoding).removeprefix("\ufeff").encode()
        index = 0
        for found in split(data, lines=lines):
            if isinstance(found, Flaw):
                if found.code == "json_layout":
                    yield from _object_rows(data, shown)
                    return
                if found.code not in ("bom", "json_not_a_list", "json_wrapped", "json_list_in_lines"):
                    raise DataError(f"{shown}: byte {found.offset}: {found.text}; correct this first")
                continue
            yield from _one(Place(shown, index, 0), data, *found)
            index += 1


def _encoding(data: Any) -> str:
    try:
        data[:].decode()
    except UnicodeDecodeError:
        return likely_encoding(data)
    return ""


def _one(place: Place, data: Any, start: int, end: int) -> Iterator[Row]:
    if end - start > MAX_RECORD_BYTES:
        raise DataError(f"{place}: more than {MAX_RECORD_BYTES >> 20} MB in one record; it is not parsed")
    try:
        value: object = json.loads(data[start:end])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: not an object")
    yield place, cast(dict[str, object], value)


def _object_rows(data: Any, shown: str) -> Iterator[Row]:
    """Yield the rows of a file that is one object: COCO's captions, or a list under some key."""
    if len(data) > MOST_JSON:
        raise DataError(f"{shown}: one object of more than {MOST_JSON >> 30} GB; cut it into parts")
    try:
        whole: dict[str, Any] = json.loads(data[:])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown}: not JSON: {error}") from None
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    items = cast(dict[str, list[Any]], lists)
    if {"images", "annotations"} <= items.keys():
        found = _coco_rows(items["images"], items["annotations"], shown)
    elif not items and all(isinstance(value, dict) and "regions" in value for value in whole.values()):
        raise DataError(f"{shown}: regions drawn with VIA; it has no questions and answers: write records of them")
    elif not items:
        found = [dict(cast(dict[str, Any], one)) for one in whole.values() if isinstance(one, dict)]
    else:
        found = next((value for value in items.values() if isinstance(value[0], dict)), [])
    for index, row in enumerate(found):
        if not isinstance(row, dict):
            raise DataError(f"{Place(shown, index, 0)}: not an object")
        yield Place(shown, index, 0), cast(dict[str, object], row)


def _coco_rows(images: list[Any], annotations: list[Any], shown: str) -> list[dict[str, Any]]:
    """Return COCO's annotations with the names of their pictures."""
    if not all(isinstance(one, dict) for one in (*images, *annotations)):
        raise DataError(f"{shown}: images and annotations must be lists of objects, as COCO has them")
    if not any(key in annotations[0] for key in ("caption", "question")):
        raise DataError(f"{shown}: COCO's boxes and classes, without captions; name its captions_*.json")
    names = {one.get("id"): one.get("file_name") for one in images}
    return [
        {**{key: value for key, value in one.items() if key != "image_id"}, "image": names.get(one.get("image_id"))}
        for one in annotations
    ]


def _table_rows(path: str | int, shown: str, delimiter: str) -> Iterator[Row]:
    with mapped(path) as data:
        encoding = _encoding(data) or "utf-8-sig"
    csv.field_size_limit(MAX_RECORD_BYTES)
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        file.seek(0)
        text = io.TextIOWrapper(file, encoding, newline="")
        try:
            for index, row in enumerate(csv.DictReader(text, delimiter=delimiter)):
                yield Place(shown, index, 0), _cells(Place(shown, index, 0), row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{shown}: not a table that can be read: {error}") from None
        finally:
            text.detach()


def _cells(place: Place, row: Mapping[Any, Any]) -> dict[str, object]:
    """Return a row of a table; JSON in a cell is read."""
    if None in row:
        raise DataError(f"{place}: more cells than the table has columns; quote the texts that hold a separator")
    found: dict[str, object] = {}
    for key, value in row.items():
        if isinstance(value, str) and value.startswith(("[", "{")):
            with suppress(ValueError, RecursionError):
                value = json.loads(value)
        found[str(key).strip()] = None if value == "" else value
    return found


def _arrow_rows(path: str | int, shown: str, batches: Callable[[Any, Any], Iterator[Any]]) -> Iterator[Row]:
    pyarrow = _pyarrow(shown)
    index = 0
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        file.seek(0)
        try:
            for batch in batches(pyarrow, file):
                for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                    for row in batch.slice(first, ROWS_AT_ONCE).to_pylist():
                        yield Place(shown, index, 0), row
                        index += 1
        except pyarrow.ArrowException as error:
            raise DataError(f"{shown}: cut short or broken ({error}); copy or download it again") from None


def _parquet(pyarrow: Any, file: IO[bytes]) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(file) as table:
        yield from table.iter_batches(ROWS_AT_ONCE)


def _arrow_file(pyarrow: Any, file: IO[bytes]) -> Iterator[Any]:
    with pyarrow.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _arrow_stream(pyarrow: Any, file: IO[bytes]) -> Iterator[Any]:
    with pyarrow.ipc.open_stream(file) as reader:
        yield from reader


def _tar_rows(path: str | int, shown: str) -> Iterator[Row]:
    """Yield the samples of a WebDataset shard: members whose names differ in their endings alone."""
    index, key = 0, ""
    sample: dict[str, object] = {}
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r|") as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    if not member.isfile() or base.startswith("."):
                        continue
                    if sample and f"{folder}/{stem}" != key:
                        yield Place(shown, index, 0), sample
                        index += 1
                        sample = {}
                    key = f"{folder}/{stem}"
                    sample.setdefault("id", stem)
                    _add_member(sample, ending.rpartition(".")[2].lower(), archive, member, Place(shown, index, 0))
        except tarfile.TarError as error:
            raise DataError(f"{shown}: cut short or broken ({error}); copy or download it again") from None
    if sample:
        yield Place(shown, index, 0), sample


def _add_member(
    sample: dict[str, Any], ending: str, archive: tarfile.TarFile, member: tarfile.TarInfo, place: Place
) -> None:
    if member.size > MAX_RECORD_BYTES:
        raise DataError(f"{place}: {member.name} has more than {MAX_RECORD_BYTES >> 20} MB; it is not read")
    file = archive.extractfile(member)
    content = file.read() if file else b""
    try:
        if ending in PICTURES:
            sample["pictures"] = [*sample.get("pictures", []), content]
        elif ending in TEXTS:
            sample["caption"] = content.decode()
        elif ending == "json":
            value: object = json.loads(content)
            fields = cast(dict[str, object], value) if isinstance(value, dict) else {"conversations": value}
            sample.update({key: item for key, item in fields.items() if key not in ("image", "images", "pictures")})
        else:
            sample[ending] = f"{len(content)} bytes"
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: {member.name} cannot be read: {error}") from None
