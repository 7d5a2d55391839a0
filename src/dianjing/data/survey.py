"""All records of some data files, read once on all cores -> what a run must know of each before its first step."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from array import array
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from dianjing.config.schema import DataConfig
from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Encoder, LongRecordError, prepared
from dianjing.data.parallel import spread
from dianjing.data.read import Place, read_line, read_records, too_large
from dianjing.data.record import Record, bad_records, parse_record, turns_alone
from dianjing.data.source import WHOLE, DataFile
from dianjing.data.split import MAX_RECORD_BYTES, Chunk, chunks, mapped
from dianjing.errors import DataError
from dianjing.pictures.picture import check_image
from dianjing.pictures.rule import PictureRule
from dianjing.progress import Watch

Task = tuple[int, Chunk]
"""The number of a data file, and some of its records."""

ROW = np.dtype(
    [
        ("file", "<i4"),
        ("start", "<i8"),
        ("end", "<i8"),
        ("record", "<i8"),
        ("line", "<i8"),
        ("turn", "<i4"),
        ("tokens", "<i4"),
        ("images", "<i4"),
        ("positions", "<i4"),
        ("supervised", "<i4"),
    ]
)
"""A record that is trained on, or one of its turns alone: where it stands, and its measures: `tokens` has a
picture as one token, `positions` as all it takes."""

ALONE_BYTES = 16 * 2**20
"""Up to here one process is done before others have started."""
TOLD_EVERY = 4096
LOOKED_AT = 2**16
"""Pictures that a process remembers to have looked at."""


@dataclass(kw_only=True)
class Pictures:
    """Picture files, each once."""

    folders: list[str] = field(default_factory=list[str])
    folder: array[int] = field(default_factory=lambda: array("i"))
    """Of each picture, its number in `folders`."""
    names: list[str] = field(default_factory=list[str])
    """Paths relative to the folder."""
    sizes: array[int] = field(default_factory=lambda: array("q"))
    """Bytes of each file."""
    times: array[int] = field(default_factory=lambda: array("q"))
    """When each was last written to, in nanoseconds since 1970."""

    def changed(self, watch: Watch) -> list[int]:
        """Return the pictures whose file is gone, or has another size or time."""
        found: list[int] = []
        for number, (folder, name, size, time) in enumerate(
            zip(self.folder, self.names, self.sizes, self.times, strict=True)
        ):
            if _look(self.folders[folder], name) != (size, time):
                found.append(number)
            if number % TOLD_EVERY == 0:
                watch("looking for pictures that were changed", number, len(self.names))
        return found


@dataclass(kw_only=True)
class Survey:
    """The facts about a data set."""

    rows: NDArray[np.void]
    """ROW, one for each record that is trained on, in order."""
    pictures: Pictures
    picture_of: NDArray[np.int32]
    """The pictures of all rows, one row after another."""
    report: dict[str, int]
    """Kind of finding -> how often."""
    skipped: tuple[str, ...]
    """One message a record that is left out."""
    fingerprint: str
    """Changes with any id, label, picture name or picture file's size."""


def survey(files: Sequence[DataFile], config: DataConfig, encoder: Encoder, watch: Watch) -> Survey:
    """Encode every record and look at every picture.

    Raises:
        DataError: a file cannot be read; or some records cannot be used, all named in one error, unless
            on_bad_record and, for the long ones, on_long_record have them skipped.
    """
    found = _Gathered(files, config, encoder)
    total = sum(file.size for file in files)
    workers = 1 if total <= ALONE_BYTES else 0
    before = [sum(file.size for file in files[:number]) for number in range(len(files))]
    for result in spread(partial(_Reader, files, config, encoder), _tasks(files), workers):
        if result.unreadable:
            raise _refused(files[result.file])
        found.add(result)
        done = before[result.file] + result.end
        watch("records and pictures", done, total)
    return found.survey()


def image_folder(config: DataConfig, source: str) -> str:
    """Return the folder that the picture paths of a data file are relative to."""
    return config.images or os.path.dirname(source) or "."


@contextmanager
def naming(record: Record) -> Generator[None]:
    """Say in which record a picture could not be used."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None


def _tasks(files: Sequence[DataFile]) -> Iterator[Task]:
    for number, file in enumerate(files):
        empty = True
        with mapped(file.number) as data:
            for found in chunks(data, lines=file.lines):
                if isinstance(found, Chunk):
                    empty = False
                    yield number, found
                    if isinstance(data, mmap.mmap):
                        data.madvise(mmap.MADV_DONTNEED)  # what was split need not stay in this process
                elif found[0].code != "bom":
                    raise _refused(file)
        if empty:
            raise _refused(file)


def _refused(file: DataFile) -> DataError:
    """Return why a file is refused whole, in the words of who reads it whole."""
    try:
        read_records(file.path, [])
    except DataError as error:
        return error
    return DataError(f"{file.path}: its records cannot be told apart; run `dianjing check` on it")


def _look(folder: str, name: str) -> tuple[int, int]:
    """Return a picture file's size and time, (-1, -1) when there is none."""
    try:
        seen = os.stat(os.path.join(folder, name))
    except (OSError, ValueError):
        file, mark, _ = name.rpartition("#")  # a frame of it
        return _look(folder, file) if mark else (-1, -1)
    return seen.st_size, seen.st_mtime_ns


@dataclass(kw_only=True)
class _Found:
    """The findings of one process in a chunk; one entry a row, unless said otherwise."""

    file: int
    end: int
    """The byte after its last record."""
    unreadable: bool = False
    """Some of it is not UTF-8, or a list holds what is not JSON."""
    rows: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    images: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    image_lengths: array[int] = field(default_factory=lambda: array("i"))
    """Image tokens of the pictures of all rows."""
    ids: array[int] = field(default_factory=lambda: array("i"))
    """Of all rows, a picture as one token."""
    labels: array[int] = field(default_factory=lambda: array("i"))
    looked_at: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Picture, of records that are left out too -> size and time."""
    counts: Counter[str] = field(default_factory=Counter[str])
    notices: Counter[str] = field(default_factory=Counter[str])
    not_records: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    too_long: list[str] = field(default_factory=list[str])


class _Reader:
    """Reads chunks; made once in each process."""

    def __init__(self, files: Sequence[DataFile], config: DataConfig, encoder: Encoder) -> None:
        self._files, self._config, self._encoder = files, config, encoder
        self._check = lru_cache(maxsize=LOOKED_AT)(partial(check_image, rule=PictureRule.of(config)))

    def __call__(self, task: Task) -> _Found:
        number, chunk = task
        found = _Found(file=number, end=chunk.elements[-1][1])
        try:
            records = [*self._records(self._files[number], chunk, found)]
        except ValueError:
            found.unreadable = True
            return found
        items = [item for at, record in records for item in self._items(at, record)]
        encoder = prepared(self._encoder, [record for _, _, record in items])
        for at, turn, record in items:
            try:
                self._read(found, encoder, at, turn, record)
            except LongRecordError as error:
                found.too_long.append(str(error))
            except DataError as error:
                found.problems.append(str(error))
        return found

    def _records(self, file: DataFile, chunk: Chunk, found: _Found) -> Iterator[tuple[tuple[int, int, int], Record]]:
        """Yield first byte, last byte and line of each record, and the record."""
        # A chunk ends with the first record that is large, so only the last can be too large.
        last_start, last_end = chunk.elements[-1]
        data = file.read(chunk.start, last_start if last_end - last_start > MAX_RECORD_BYTES else last_end)
        line, position = chunk.first_line, chunk.start
        for index, (start, end) in enumerate(chunk.elements, chunk.first_record):
            line += data.count(b"\n", position - chunk.start, start - chunk.start)
            position = start
            place = Place(file.path, index, line if file.lines else 0)
            if end - start > MAX_RECORD_BYTES:
                found.not_records.append(f"{place}: {too_large(end - start)}")
                continue
            text = data[start - chunk.start : end - chunk.start].decode()
            try:
                value = read_line(text, place) if file.lines else _json(text)
                record, noticed = parse_record(value, place)
            except DataError as error:
                found.not_records.append(str(error))
            else:
                found.notices.update(noticed)
                yield (start, end, place.line), record

    def _items(self, at: tuple[int, int, int], record: Record) -> Iterator[tuple[tuple[int, int, int], int, Record]]:
        """Yield a record, and each of its turns alone where the recipe trains on them."""
        yield at, WHOLE, record
        if self._config.turns == "both" and len(record.turns) > 1:
            alone = enumerate(turns_alone(record))
            yield from ((at, turn, one) for turn, one in alone if one.turns[0].learned)

    def _read(self, found: _Found, encoder: Encoder, at: tuple[int, int, int], turn: int, record: Record) -> None:
        ids, labels, truncated = encoder.tokens(record)
        counts = encoder.counts(len(record.images))
        images, positions = len(counts), len(ids) + sum(counts) - len(counts)
        if positions > self._config.pack_tokens:
            raise DataError(
                f"{record.where}: {positions} positions with its pictures, but data.pack_tokens is "
                f"{self._config.pack_tokens}; raise it, or shorten the record"
            )
        folder = image_folder(self._config, record.source)
        with naming(record):
            for name in record.images:
                # Before the check: what changes after it, the next start sees.
                found.looked_at[name] = _look(folder, name)
                self._check(folder, name)
        supervised = len(labels) - labels.count(IGNORE_INDEX)
        start, end, line = at
        found.rows.append((found.file, start, end, record.index, line, turn, len(ids), images, positions, supervised))
        found.images.append(record.images)
        found.image_lengths.extend(counts)
        found.ids.extend(ids)
        found.labels.extend(labels)
        found.counts["pictures"] += images
        found.counts["text-only"] += not images
        found.counts["turns"] += len(record.turns)
        found.counts["positions"] += positions
        found.counts["supervised tokens"] += supervised
        found.counts["truncated"] += truncated > 0


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError from error


class _Gathered:
    """The contents of all chunks, in order."""

    def __init__(self, files: Sequence[DataFile], config: DataConfig, encoder: Encoder) -> None:
        self._files, self._config, self._encoder = files, config, encoder
        self.counts: Counter[str] = Counter()
        self.pictures = Pictures()
        self._rows: list[NDArray[np.void]] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._picture_of = array("i")
        self._notices: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._not_records: list[str] = []
        self._problems: list[str] = []
        self._too_long: list[str] = []

    def add(self, found: _Found) -> None:
        """Append a chunk."""
        rows = np.array(found.rows, ROW)
        self._rows.append(rows)
        self.counts["records"] += len(rows)
        self.counts.update(found.counts)
        self._notices.update(found.notices)
        self._not_records += found.not_records
        self._problems += found.problems
        self._too_long += found.too_long
        self._take_pictures(found)
        self._take_tokens(found, rows)

    def survey(self) -> Survey:
        """Return all of it, or refuse it.

        Raises:
            DataError: as `survey` does.
        """
        problems = [*self._not_records, *self._problems]
        refused = [*(problems if self._config.on_bad_record == "error" else ())]
        refused += self._too_long if self._config.on_long_record == "error" else ()
        if refused:
            raise bad_records(refused)
        skipped = (*problems, *self._too_long)
        if not self.counts["records"]:
            raise DataError("\n  ".join([f"{self._config.path}: no record is left to use; skipped:", *skipped[:3]]))
        return Survey(
            rows=np.concatenate(self._rows),
            pictures=self.pictures,
            picture_of=np.array(self._picture_of, np.int32),
            report={**self.counts, "skipped": len(skipped), **self._notices},
            skipped=skipped,
            fingerprint=self._digest.hexdigest(),
        )

    def _take_pictures(self, found: _Found) -> None:
        pictures, path = self.pictures, self._files[found.file].path
        folder = image_folder(self._config, path)
        if folder not in pictures.folders:
            pictures.folders.append(folder)
        number_of_folder = pictures.folders.index(folder)
        numbers: dict[str, int] = {}
        for name, (size, time) in found.looked_at.items():
            numbers[name] = self._numbers.setdefault((number_of_folder, name), len(pictures.names))
            if numbers[name] == len(pictures.names):
                pictures.folder.append(number_of_folder)
                pictures.names.append(name)
                pictures.sizes.append(size)
                pictures.times.append(time)
        for images in found.images:
            self._picture_of.extend(numbers[name] for name in images)

    def _take_tokens(self, found: _Found, rows: NDArray[np.void]) -> None:
        """Add ids, labels, pictures' sizes and names of each row to the fingerprint, as 64-bit numbers and text."""
        ids = np.array(found.ids, np.int64)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self._encoder.image_token_id] = found.image_lengths
        ids, labels = np.repeat(ids, repeats), np.repeat(np.array(found.labels, np.int64), repeats)
        ends = np.cumsum(rows["positions"], dtype=np.int64)
        start = 0
        for end, images in zip(ends.tolist(), found.images, strict=True):
            sizes = array("q", [found.looked_at[name][0] for name in images])
            for part in (ids[start:end].data, labels[start:end].data, sizes.tobytes(), repr(images).encode()):
                self._digest.update(part)
            start = end
