"""One JSON record -> Record; an error names file, record and field."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from dianjing.config.schema import OnBad
from dianjing.constants import IMAGE_MARKER
from dianjing.errors import DataError

PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer; `<image>` in a question is a picture, in an answer it is plain text."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation and its pictures, in the order of their `<image>` markers."""

    id: str
    images: tuple[str, ...]
    """Paths relative to the image folder."""
    turns: tuple[Turn, ...]
    types: tuple[str, ...]
    """One question type a turn, for scoring; () when the record names none."""
    source: str
    """The file it came from."""
    index: int
    """Its number in that file, from 0."""
    line: int = 0
    """Its line in a JSONL file, from 1; 0 in a JSON file."""

    @property
    def where(self) -> str:
        """Return how a message names this record."""
        return f'{Place(self.source, self.index, self.line)} ("{self.id}")'


@dataclass(frozen=True)
class Place:
    """Where a record stands, for messages."""

    source: str
    index: int
    line: int

    def __str__(self) -> str:
        return f"{self.source}: " + (f"line {self.line}" if self.line else f"record {self.index}")


@dataclass(frozen=True, kw_only=True)
class RecordSet:
    """All usable records, and what was noticed and skipped on the way."""

    records: tuple[Record, ...]
    notices: Mapping[str, int]
    """What was accepted but is worth saying -> how often."""
    skipped: tuple[str, ...]
    """One message a record that cannot be used."""


def load_records(paths: str | Sequence[str], *, on_bad_record: OnBad = "error") -> RecordSet:
    """Read LLaVA records from `.json` and `.jsonl` files, joined in the order given.

    Raises:
        DataError: a file cannot be read; or, unless bad records are skipped, some records cannot be used (one
            error names them all).
    """
    records: list[Record] = []
    notices: Counter[str] = Counter()
    problems: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        for place, value in read_records(path, problems):
            try:
                record, noticed = parse_record(value, place)
            except DataError as error:
                problems.append(str(error))
            else:
                records.append(record)
                notices.update(noticed)
    if problems and on_bad_record == "error":
        raise bad_records(problems)
    return RecordSet(records=tuple(records), notices=notices, skipped=tuple(problems))


def bad_records(problems: Sequence[str]) -> DataError:
    """Return the one error that lists what is wrong with a data set."""
    number = f"{len(problems)} records" if len(problems) > 1 else "1 record"
    more = len(problems) - PROBLEMS_SHOWN
    lines = [
        f"{number} cannot be used:",
        *problems[:PROBLEMS_SHOWN],
        *([f"and {more} more"] if more > 0 else []),
    ]
    return DataError("\n  ".join(lines) + '\nPut them right, or leave them out with data.on_bad_record = "skip".')


def read_records(path: str, problems: list[str]) -> list[tuple[Place, object]]:
    """Return the JSON values of a file with their places; a bad line of a JSONL file is added to `problems`.

    Raises:
        DataError: the file is missing, is of another kind, or is not JSON.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".json", ".jsonl"):
        raise DataError(f'{path}: the data file must end in .json (a list) or .jsonl, not in "{suffix}"')
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give a LLaVA JSON or JSONL file") from None
    before = len(problems)
    found = _read_list(path, text) if suffix == ".json" else _read_lines(path, text, problems)
    if not found and len(problems) == before:
        raise DataError(f"{path}: there is no record in it")
    return found


def _read_list(path: str, text: str) -> list[tuple[Place, object]]:
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {_not_json(error)}") from None
    if not isinstance(values, list):
        raise DataError(f"{path}: it holds {_kind(values)}, not a list of records; put [ and ] around them")
    return [(Place(path, i, 0), value) for i, value in enumerate(cast(list[object], values))]


def _read_lines(path: str, text: str, problems: list[str]) -> list[tuple[Place, object]]:
    found: list[tuple[Place, object]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((Place(path, len(found), number), json.loads(line)))
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}: {_not_json(error, number)}")
    return found


def _not_json(error: Exception, first_line: int = 1) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {first_line + error.lineno - 1}, column {error.colno}: {error.msg}"
    return f"not JSON that can be read: {error}"


def parse_record(value: object, place: Place) -> tuple[Record, Counter[str]]:
    """Return the record that a JSON value describes, and what was noticed in it.

    Raises:
        DataError: the value is no usable record.
    """
    if not isinstance(value, dict):
        raise DataError(f'{place}: {_kind(value)}, not a record {{"image": ..., "conversations": [...]}}')
    fields = cast(dict[str, object], value)
    noticed: Counter[str] = Counter()
    record_id = str(place.index)
    try:
        record_id = _id(fields, place)
        images = _images(fields.get("image"))
        turns = _turns(_messages(fields, noticed), noticed)
        _check_markers(turns, images, fields)
        types = _types(fields.get("types"), len(turns))
    except DataError as error:
        raise DataError(f'{place} ("{record_id}"): {error}') from None
    record = Record(
        id=record_id,
        images=images,
        turns=turns,
        types=types,
        source=place.source,
        index=place.index,
        line=place.line,
    )
    return record, noticed


def _id(fields: Mapping[str, object], place: Place) -> str:
    value = fields.get("id")
    if value is None:
        return str(place.index)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"id is {_kind(value)}; write a string or a whole number")
    return str(value)


def _images(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    values = cast(list[object], value) if isinstance(value, list) else [value]
    for name in values:
        if not isinstance(name, str) or not name:
            kind = "an empty string" if name == "" else _kind(name)
            raise DataError(f"image is {kind}; write a path, a list of paths, or null for a text-only record")
    return tuple(cast(list[str], values))


def _messages(fields: Mapping[str, object], noticed: Counter[str]) -> list[tuple[str, str]]:
    """Return (role, text) of each message."""
    key = "conversations"
    if key not in fields and "conversation" in fields:
        key = "conversation"
        noticed['records with "conversation" for "conversations"'] += 1
    if key not in fields:
        raise DataError(f'there is no "conversations" among its keys ({", ".join(fields) or "none"})')
    values = fields[key]
    if not isinstance(values, list):
        raise DataError(f'{key} is {_kind(values)}; write a list of {{"from": ..., "value": ...}}')
    if not values:
        raise DataError(f"{key} is empty; add a question and its answer, or remove the record")
    return [_message(value, f"{key}[{i}]") for i, value in enumerate(cast(list[object], values))]


def _message(value: object, name: str) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise DataError(f'{name} is {_kind(value)}; write {{"from": ..., "value": ...}}')
    fields = cast(dict[str, object], value)
    role, text = fields.get("from"), fields.get("value")
    if role not in ("human", "gpt"):
        said = f'is from "{role}"' if isinstance(role, str) else 'has no "from"'
        raise DataError(f'{name} {said}; only "human" and "gpt" are known: rename its role or remove the message')
    if not isinstance(text, str):
        raise DataError(f"{name}.value is {_kind(text)}; write a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name}.value holds half a character (a lone surrogate \\ud8..); remove it") from None
    return str(role), text


def _turns(messages: Sequence[tuple[str, str]], noticed: Counter[str]) -> tuple[Turn, ...]:
    """Join messages to turns as XTuner does: human messages with nothing between, up to an answer."""
    turns: list[Turn] = []
    asked: list[str] = []
    for role, text in messages:
        if role == "human":
            asked.append(place_marker(text))
        elif not asked and not turns:
            noticed["answers before the first question dropped"] += 1
        else:
            if not asked:
                noticed["answers after an answer, to an empty question"] += 1
            if not text.strip():
                raise DataError(f"the answer of turn {len(turns)} is empty; write it or remove the turn")
            turns.append(Turn(question="".join(asked), answer=text))
            asked = []
    if not turns:
        raise DataError('no human message has an answer; add a message from "gpt", or remove the record')
    if asked:
        noticed["unanswered last questions dropped"] += 1
    return tuple(turns)


def place_marker(text: str) -> str:
    """Return a human message with its marker in front, as LLaVA and XTuner do; several stay in place."""
    count = text.count(IMAGE_MARKER)
    if count == 1:
        return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()
    return text.strip() if count else text


def _check_markers(turns: Sequence[Turn], images: Sequence[str], fields: Mapping[str, object]) -> None:
    markers = sum(turn.question.count(IMAGE_MARKER) for turn in turns)
    if markers == len(images):
        return
    if not markers:
        raise DataError(
            f"{_count(len(images), 'image')} but no {IMAGE_MARKER} marker in an answered human message; "
            f"write {IMAGE_MARKER} where the picture belongs, or remove it"
        )
    hint = ' (the key is "image", not "images")' if "images" in fields and not images else ""
    way_out = "add the image or remove a marker" if markers > len(images) else "add a marker or remove an image"
    found = f"{_count(markers, f'{IMAGE_MARKER} marker')} but {_count(len(images), 'image')}"
    raise DataError(f"{found}{hint}; {way_out}")


def _types(value: object, turns: int) -> tuple[str, ...]:
    if value is None:
        return ()
    values = cast(list[object], value) if isinstance(value, list) else []
    if len(values) != turns or not all(isinstance(name, str) for name in values):
        raise DataError(f"types must be a list of {turns} strings, one for each answered turn")
    return tuple(cast(list[str], values))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _kind(value: object) -> str:
    kinds = ((dict, "an object"), (list, "a list"), (str, "a string"), (bool, "true or false"))
    found = next((name for kind, name in kinds if isinstance(value, kind)), "a number")
    return "null" if value is None else found


def turns_alone(record: Record) -> list[Record]:
    """Return each turn of a record as a record of one turn.

    A turn without a marker is about the pictures shown so far, so they are put in front of it.
    """
    alone: list[Record] = []
    shown = 0
    for number, turn in enumerate(record.turns):
        own = turn.question.count(IMAGE_MARKER)
        images = record.images[shown : shown + own] if own else record.images[:shown]
        shown += own
        question = turn.question if own else with_markers(turn.question, len(images))
        types = record.types[number : number + 1]
        alone.append(replace(record, images=images, turns=(replace(turn, question=question),), types=types))
    return alone


def with_markers(question: str, count: int) -> str:
    """Return the question with `count` pictures in front, as LLaVA writes it."""
    return (f"{IMAGE_MARKER}\n" * count + question).strip() if count else question


def without_markers(question: str) -> str:
    """Return the question alone, without its pictures."""
    return question.replace(IMAGE_MARKER, "").strip()
