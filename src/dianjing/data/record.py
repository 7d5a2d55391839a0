"""One JSON record -> Record; an error names file, record and field."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar, cast

from dianjing.config.schema import OnBad
from dianjing.constants import IMAGE_MARKER
from dianjing.data.marks import MEDIA_KEYS, NAMED_PICTURE, foreign_marks, medium_in
from dianjing.data.read import Place, kind_of, read_records
from dianjing.errors import DataError
from dianjing.language import say

Given = ParamSpec("Given")
Result = TypeVar("Result")

PROBLEMS_SHOWN = 20
NOTICES: Mapping[str, str] = {
    "conversation_key": 'records with "conversation" for "conversations"',
    "answer_first": "answers before the first question dropped",
    "answer_twice": "answers after an answer, to an empty question",
    "question_unanswered": "unanswered last questions dropped",
    "system_dropped": "system texts dropped; a record has none",
    "type_unread": 'question types that are not read; write "type", a string or a list of one for each answered turn',
}
"""Notices about what is accepted, by their codes."""
SYSTEM_KEYS = ("system", "system_prompt")
NOT_READ = frozenset([*MEDIA_KEYS, *SYSTEM_KEYS])
TYPE_KEY = re.compile(r"(question|answer|qa?|task)?[ _-]?types?|(question)?[ _-]?category", re.IGNORECASE)
"""How others call the question type."""


class RecordError(DataError):
    """A fault of one field of a record; the message does not name the record."""

    def __init__(self, code: str, field: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.field = field


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One question and its answer; `<image>` in a question is a picture, in an answer it is plain text."""

    question: str
    answer: str
    learned: bool = True
    """False if the answer is only shown, as a message with "loss": false or "weight": 0 asks for."""


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


@dataclass(frozen=True, kw_only=True)
class RecordSet:
    """All usable records, and what was noticed and skipped on the way."""

    records: tuple[Record, ...]
    notices: Mapping[str, int]
    """Notice about what was accepted -> how often."""
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


def parse_record(value: object, place: Place) -> tuple[Record, Counter[str]]:
    """Return the record that a JSON value describes, and what was noticed in it.

    Raises:
        DataError: the value is not a usable record.
    """
    examined = examine(value, place)
    if examined.record is None:
        name = f' ("{examined.id}")' if isinstance(value, dict) else ""
        raise DataError(f"{place}{name}: {examined.problems[0]}")
    return examined.record, Counter({NOTICES[code]: number for code, number in examined.noticed.items()})


@dataclass(kw_only=True)
class Examined:
    """A JSON value, held against all rules for a record."""

    id: str
    record: Record | None = None
    """None when there is a problem."""
    noticed: Counter[str] = field(default_factory=Counter[str])
    """Code of NOTICES -> how often."""
    problems: list[RecordError] = field(default_factory=list[RecordError])

    def attempt(self, read: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result | None:
        """Return what `read` makes of a part of the record; None, and one problem more, where it cannot."""
        try:
            return read(*given, **named)
        except RecordError as error:
            self.problems.append(error)
            return None


def examine(value: object, place: Place) -> Examined:
    """Return the record that a JSON value describes, or everything that keeps it from being one."""
    found = Examined(id=str(place.index))
    if not isinstance(value, dict):
        text = f'{kind_of(value)}, not a record {{"image": ..., "conversations": [...]}}'
        found.problems.append(RecordError("not_a_record", "", text))
        return found
    fields = cast(dict[str, object], value)
    name = found.attempt(_id, fields, place)
    found.id = found.id if name is None else name
    if not NOT_READ.isdisjoint(fields):
        found.attempt(_look_at_others, fields, found.noticed)
    images = found.attempt(_images, fields.get("image"))
    turns = found.attempt(_turns, fields, found)
    if images is None or not turns or found.problems:
        return found
    found.attempt(_check_markers, turns, images, fields)
    types = found.attempt(_types, fields, len(turns), found.noticed)
    if types is not None and not found.problems:
        found.record = Record(
            id=found.id,
            images=images,
            turns=tuple(turns),
            types=types,
            source=place.source,
            index=place.index,
            line=place.line,
        )
    return found


def _id(fields: Mapping[str, object], place: Place) -> str:
    value = fields.get("id")
    if value is None:
        return str(place.index)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # of pandas, which writes 12 as 12.0
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError("id_type", "id", f"id is {kind_of(value)}; write a string or a whole number")
    return str(value)


def _images(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    values = cast(list[object], value) if isinstance(value, list) else [value]
    for name in values:
        if not isinstance(name, str) or not name:
            kind = "an empty string" if name == "" else kind_of(name)
            text = f"image is {kind}; write a path, a list of paths, or null for a text-only record"
            raise RecordError("image_type", "image", text)
        _check_characters(name, "image")
    return tuple(cast(list[str], values))


def _look_at_others(fields: Mapping[str, object], noticed: Counter[str]) -> None:
    """Notice texts that are dropped.

    Raises:
        RecordError: a medium that is not a picture belongs to the record.
    """
    for key in MEDIA_KEYS & fields.keys():
        if fields[key]:
            text = f'"{key}" names a medium that is not read; put pictures (frames) under "image", or remove the record'
            raise RecordError("media_other", key, text)
    if any(fields.get(key) for key in SYSTEM_KEYS):
        noticed["system_dropped"] += 1


@dataclass(frozen=True, slots=True)
class _Message:
    role: str
    text: str
    learned: bool


def _messages(fields: Mapping[str, object], found: Examined) -> list[_Message]:
    """Return the messages; what is wrong with single ones is added to the problems."""
    key = "conversations"
    if key not in fields and "conversation" in fields:
        key = "conversation"
        found.noticed["conversation_key"] += 1
    if key not in fields:
        near = difflib.get_close_matches("conversations", fields, 1)
        hint = f'; is "{near[0]}" meant?' if near else "; `dianjing check FILE --convert OUT.json` reads other layouts"
        text = f'there is no "conversations" among its keys ({", ".join(fields) or "none"}){hint}'
        raise RecordError("conversations_missing", "conversations", text)
    values = fields[key]
    if not isinstance(values, list):
        text = f'{key} is {kind_of(values)}; write a list of {{"from": ..., "value": ...}}'
        raise RecordError("conversations_type", key, text)
    if not values:
        text = f"{key} is empty; add a question and its answer, or remove the record"
        raise RecordError("conversations_empty", key, text)
    read = [found.attempt(_message, value, f"{key}[{i}]") for i, value in enumerate(cast(list[object], values))]
    return [message for message in read if message]


def _message(value: object, name: str) -> _Message:
    if not isinstance(value, dict):
        raise RecordError("message_type", name, f'{name} is {kind_of(value)}; write {{"from": ..., "value": ...}}')
    fields = cast(dict[str, object], value)
    role, text = fields.get("from"), fields.get("value")
    if role not in ("human", "gpt"):
        raise RecordError("role_unknown", f"{name}.from", _role_unknown(fields, name))
    if not isinstance(text, str):
        raise RecordError("value_type", f"{name}.value", f"{name}.value is {kind_of(text)}; write a string")
    _check_characters(text, f"{name}.value")
    if role == "human" and (text.count("<") > text.count(IMAGE_MARKER) or "＜" in text):
        _check_marks(text, f"{name}.value")
    return _Message(str(role), text, len(fields) == 2 or _learned(fields, name))


def _role_unknown(fields: Mapping[str, object], name: str) -> str:
    role = fields.get("from")
    said = f'is from "{role}"' if isinstance(role, str) else 'has no "from"'
    text = f'{name} {said}; only "human" and "gpt" are known: rename its role or remove the message'
    if "from" not in fields and ({"input", "output"} <= fields.keys() or {"human", "assistant"} <= fields.keys()):
        text = (
            f"{name} is a whole turn ({', '.join(fields)}); `dianjing check FILE --convert OUT.json` reads this layout"
        )
    return text


def _check_marks(text: str, name: str) -> None:
    """Refuse a question that shows what is not read, or names its picture in a way that is not."""
    if medium := medium_in(text):
        message = f"{name} shows another medium ({medium}), which is not read; use pictures, or remove the record"
        raise RecordError("media_other", name, message)
    if named := NAMED_PICTURE.search(text):
        message = (
            f'{name} names a picture in its text ({named.group()}); put its path under "image" and write {IMAGE_MARKER}'
        )
        raise RecordError("picture_in_text", name, message)


def _learned(fields: Mapping[str, object], name: str) -> bool:
    """Return whether a message is learned if it is an answer."""
    for key in ("loss", "weight"):
        value = fields.get(key)
        if value is not None and value not in (0, 1):
            text = f"{name}.{key} is {value!r}; write 1 (learned) or 0 (only shown), which is all there is"
            raise RecordError("turn_weight", f"{name}.{key}", text)
        if value is not None and not value:
            return False
    return True


def _check_characters(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{name} holds half a character (a lone surrogate \\ud8..); remove it"
        raise RecordError("text_surrogate", name, message) from None


def _turns(fields: Mapping[str, object], found: Examined) -> list[Turn]:
    """Join messages to turns as XTuner does: human messages with nothing between, up to an answer."""
    messages = _messages(fields, found)
    turns: list[Turn] = []
    asked: list[str] = []
    for message in messages:
        text = message.text
        if message.role == "human":
            asked.append(place_marker(text))
        elif not asked and not turns:
            found.noticed["answer_first"] += 1
        else:
            if not asked:
                found.noticed["answer_twice"] += 1
            if not text.strip():
                problem = f"the answer of turn {len(turns)} is empty; write it or remove the turn"
                found.problems.append(RecordError("answer_empty", "conversations", problem))
            turns.append(Turn(question="".join(asked), answer=text, learned=message.learned))
            asked = []
    if not turns and not found.problems:
        problem = 'no human message has an answer; add a message from "gpt", or remove the record'
        if {message.role for message in messages} == {"human", "gpt"}:
            problem = "the answers stand before their questions: gpt speaks first; exchange human and gpt"
        raise RecordError("no_answer", "conversations", problem)
    if turns and not any(turn.learned for turn in turns):
        problem = "nothing is learned from it: each answer has loss false or weight 0; remove the record, or those"
        found.problems.append(RecordError("nothing_learned", "conversations", problem))
    if asked:
        found.noticed["question_unanswered"] += 1
    return turns


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
        raise RecordError("marker_missing", "conversations", _marker_missing(len(images), turns, fields))
    hint = ' (the key is "image", not "images")' if "images" in fields and not images else ""
    way_out = "add the image or remove a marker" if markers > len(images) else "add a marker or remove an image"
    found = f"{_count(markers, f'{IMAGE_MARKER} marker')} but {_count(len(images), 'image')}{_foreign_hint(turns)}"
    raise RecordError("marker_count", "conversations" if images else "image", f"{found}{hint}; {way_out}")


def _marker_missing(images: int, turns: Sequence[Turn], fields: Mapping[str, object]) -> str:
    found = f"{_count(images, 'image')} but no {IMAGE_MARKER} marker in an answered human message"
    said = cast(list[Mapping[str, object]], fields.get("conversations", fields.get("conversation")))
    if any(message["from"] == "gpt" and IMAGE_MARKER in str(message["value"]) for message in said):
        return f"{found}, but in one from gpt; move it to the question, or exchange human and gpt if they are swapped"
    return f"{found}{_foreign_hint(turns)}; write {IMAGE_MARKER} where the picture belongs, or remove it"


def _foreign_hint(turns: Sequence[Turn]) -> str:
    """Return which other placeholder the questions have, in words; "" for none."""
    mark = next((mark.group() for turn in turns for mark in foreign_marks(turn.question)), "")
    return f" ({mark} is not read as one)" if mark else ""


def _types(fields: Mapping[str, object], turns: int, noticed: Counter[str]) -> tuple[str, ...]:
    """Return the question types that "types" names, or else "type".

    "type" may mean something else in data from elsewhere, so one that cannot be read is only noticed.
    """
    types, type_ = (_one_each(fields.get(key), turns) for key in ("types", "type"))
    if types is None or isinstance(fields.get("types"), str):
        raise RecordError(
            "types_count", "types", f"types must be a list of {turns} strings, one for each answered turn"
        )
    read = types or type_ or ()
    other_key = not read and any(TYPE_KEY.fullmatch(key) for key in fields.keys() - {"types", "type"})
    if other_key or type_ not in ((), read):
        noticed["type_unread"] += 1
    return read


def _one_each(value: object, turns: int) -> tuple[str, ...] | None:
    """Return a string for each turn, () where there is no value, None where it is something else."""
    if value is None or value == "":
        return ()
    values = cast(list[object], value) if isinstance(value, list) else [value] * turns
    if len(values) != turns or not all(isinstance(name, str) for name in values):
        return None
    return tuple(cast(list[str], values))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


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


FEW_PICTURES = 10
"""Fewer different pictures are learned by heart."""


def few_pictures(number: int) -> str:
    """Return what is to be said of a training set with this number of different pictures; "" where they suffice."""
    if not 0 < number < FEW_PICTURES:
        return ""
    return say(
        "{pictures}: a model learns the answers by heart, and nothing here can teach it to tell other pictures apart",
        pictures=say("one picture") if number == 1 else say("only {number} different pictures", number=number),
    )


def with_markers(question: str, count: int) -> str:
    """Return the question with `count` pictures in front, as LLaVA writes it."""
    return (f"{IMAGE_MARKER}\n" * count + question).strip() if count else question


def without_markers(question: str) -> str:
    """Return the question alone, without its pictures."""
    return question.replace(IMAGE_MARKER, "").strip()
