"""The results of a survey, kept on disk under the hash of all that decides them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dianjing.config.schema import DataConfig
from dianjing.data import encode, picture_tokens, read, record, source, split, survey, template
from dianjing.data.encode import Encoder, plain_backend
from dianjing.data.record import bad_records
from dianjing.data.source import DataFile
from dianjing.data.survey import ROW, Pictures, Survey
from dianjing.errors import DataError
from dianjing.pictures import dicom, kinds, picture, profile, rule, tiff, wide
from dianjing.pictures.rule import PictureRule
from dianjing.progress import Watch

PICTURES = (dicom, kinds, picture, profile, rule, tiff, wide)
MODULES = (encode, picture_tokens, read, record, source, split, survey, template, *PICTURES)
DECIDING = [*(str(module.__file__) for module in MODULES), __file__]
"""The files of the program that decide what a survey finds; with any change in them it is made again."""
PACKAGES = ("pillow", "tokenizers", "transformers", "pydicom", "pillow-heif")
KEPT = 32
"""Surveys on disk, those used last."""


def cache_folder(name: str) -> Path:
    """Return the folder for one kind of files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dianjing" / name


Known = tuple[Survey | None, str]
"""A survey of the cache, if there is one that holds, and a line on it."""


def key_of(files: Sequence[DataFile], config: DataConfig, encoder: Encoder) -> str:
    """Return a hash that changes with the bytes of the data files and with all else that decides a survey, but for the
    pictures."""
    fields = {
        "program": [Path(path).read_text(encoding="utf-8") for path in DECIDING],
        "versions": [_version(name) for name in PACKAGES],
        "paths": [file.path for file in files],
        "files": [file.digest().hex() for file in files],
        "folders": [os.path.abspath(survey.image_folder(config, file.path)) for file in files],
        "tokenizer": plain_backend(encoder.tokenizer).to_str(),
        "specials": [encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id],
        "splits specials": bool(getattr(encoder.tokenizer, "split_special_tokens", False)),
        "template": asdict(encoder.template),
        "encoder": [repr(encoder.picture_tokens), encoder.max_tokens, encoder.on_long_record, encoder.image_token_id],
        "pictures": asdict(PictureRule.of(config)),
        "data": [config.images, config.turns, config.on_bad_record, config.on_long_record, config.pack_tokens],
    }
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def _version(package: str) -> str:
    """Return the version of a package, "" when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cached_survey(files: Sequence[DataFile], config: DataConfig, encoder: Encoder, watch: Watch) -> tuple[Survey, str]:
    """Return the survey of these files, from the cache if it still holds, and a line on where it is from.

    Raises:
        DataError: as `survey.survey` does.
    """
    entry = Entry(key_of(files, config, encoder))
    found, note = _still_right(entry, files, config, watch)
    if found:
        return found, note
    with entry.locked(watch):
        found, again = _still_right(entry, files, config, watch)
        if found:  # another process was faster
            return found, again
        found = survey.survey(files, config, encoder, watch)
        try:
            entry.save(found)
        except OSError as error:
            note = f"{entry.path}: not written ({error.strerror}); the next start will read every record again"
    return found, note


def _still_right(entry: Entry, files: Sequence[DataFile], config: DataConfig, watch: Watch) -> Known:
    """Return the survey of the cache, None when there is none that holds, and why."""
    try:
        found = entry.load()
    except ValueError as error:
        return None, f"{entry.path}: cannot be used ({error}); every record was read again"
    if found is None:
        return None, ""
    changed = found.pictures.changed(watch)
    if not changed:
        return found, f"records and pictures are as at an earlier start ({entry.path})"
    if config.on_bad_record == "error":
        _require_usable(changed, found, files, PictureRule.of(config))
    some = f"{len(changed):,} of {len(found.pictures.names):,} pictures"
    return None, f"{some} were changed after an earlier start; every record was read again"


def _require_usable(changed: Sequence[int], found: Survey, files: Sequence[DataFile], rule: PictureRule) -> None:
    """Refuse pictures that went away or bad.

    Raises:
        DataError: all records that show one, in one error.
    """
    reasons: dict[int, DataError] = {}
    for number in changed:
        try:
            folder = found.pictures.folders[found.pictures.folder[number]]
            picture.check_image(folder, found.pictures.names[number], rule)
        except DataError as error:
            reasons[number] = error
    shown = np.flatnonzero(np.isin(found.picture_of, list(reasons)))
    row_of = np.repeat(np.arange(len(found.rows)), found.rows["images"])
    first = {int(row_of[at]): reasons[int(found.picture_of[at])] for at in reversed(shown.tolist())}
    records = source.Records(files, found.rows)
    if first:
        raise bad_records([f"{records[row].where}: {first[row]}" for row in sorted(first)])


class Entry:
    """The place of one survey in the cache."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.path = cache_folder("data") / f"{key[:32]}.npz"

    def load(self) -> Survey | None:
        """Return the survey, None when there is none.

        Raises:
            ValueError: the file is damaged, or is something else.
        """
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = _unpacked({name: arrays[name] for name in arrays.files}, self._key)
        except FileNotFoundError:
            return None
        except Exception as error:  # what numpy and zipfile raise depends on where the file is wrong
            raise ValueError(str(error) or type(error).__name__) from error
        with suppress(OSError):
            os.utime(self.path)
        return found

    def save(self, found: Survey) -> None:
        """Write the survey: all of it, or nothing; the surveys used longest ago make room.

        Raises:
            OSError: it cannot be written.
        """
        part = self.path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.savez(file, **_packed(found, self._key))
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # another process makes room too
            kept = sorted(self.path.parent.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in kept[KEPT:]:
                old.unlink()
                old.with_suffix(".lock").unlink(missing_ok=True)

    @contextmanager
    def locked(self, watch: Watch) -> Generator[None]:
        """Let one process at a time make this survey; where locks or the folder are not to be had, each makes it."""
        with ExitStack() as stack:
            with suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(self.path.with_suffix(".lock").open("ab"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    watch("waiting for another process, which reads the same data", 0, 1)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _packed(found: Survey, key: str) -> dict[str, Any]:
    pictures = found.pictures
    about = {
        "key": key,
        "report": found.report,
        "skipped": found.skipped,
        "fingerprint": found.fingerprint,
        "folders": pictures.folders,
        "names": pictures.names,
    }
    return {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "rows": found.rows,
        "picture_of": found.picture_of,
        "folder": np.array(pictures.folder, np.int32),
        "sizes": np.array(pictures.sizes, np.int64),
        "times": np.array(pictures.times, np.int64),
    }


def _unpacked(arrays: Mapping[str, Any], key: str) -> Survey:
    about: Any = json.loads(arrays["about"].tobytes())
    rows = arrays["rows"]
    pictures = Pictures(
        folders=about["folders"],
        folder=array("i", arrays["folder"].tobytes()),
        names=about["names"],
        sizes=array("q", arrays["sizes"].tobytes()),
        times=array("q", arrays["times"].tobytes()),
    )
    if about["key"] != key or rows.dtype != ROW or len(arrays["picture_of"]) != rows["images"].sum():
        raise ValueError("it belongs to other data")
    if not len(pictures.names) == len(pictures.folder) == len(pictures.sizes) == len(pictures.times):
        raise ValueError("it is not whole")
    return Survey(
        rows=rows,
        pictures=pictures,
        picture_of=arrays["picture_of"],
        report=about["report"],
        skipped=tuple(about["skipped"]),
        fingerprint=about["fingerprint"],
    )
