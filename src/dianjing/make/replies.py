"""Raw reply -> questions and answers: strict JSON, or JSON found in prose when there is one reading of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
"""The subset that all servers know: every field required, no others, no limits (those are checked here)."""
SCHEMA_NAME = "question_answer_pairs"
MAX_CHARACTERS = 50_000
MAX_READINGS = 20
"""Bounds on what is looked through in a reply, however it is made."""
STRING_OR_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.DOTALL)
"""A string, or a comma with nothing after it."""
THOUGHT = re.compile(r"\A.*</think(ing)?>", re.DOTALL)
"""Its opening is missing where the chat template writes it."""
BOX = re.compile(r"<\|(begin|end)_of_box\|>")
LABEL = re.compile(
    r"\A(\*\*|#+ )?(caption|description|answer|标题|描述|答案|回答)(\*\*)?\s*[:：]\s*(\*\*)?\s*", re.IGNORECASE
)


class InvalidReply(Exception):
    """A reply is not what was asked for; the text says why, so that the model can be asked again with it."""


@dataclass(frozen=True)
class Pair:
    """One question and its answer."""

    question: str
    answer: str


def read_text(reply: str) -> str:
    """Return a plain reply without the thoughts, the label and the quotes that are around it.

    Raises:
        InvalidReply: there is nothing else.
    """
    text = _unquoted(LABEL.sub("", BOX.sub("", THOUGHT.sub("", reply)).strip()))
    if not text:
        raise InvalidReply("the reply is empty")
    if len(text) > MAX_CHARACTERS:
        raise InvalidReply(f"the reply has {len(text):,} characters; write less")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidReply("the reply holds half a character (a lone surrogate)") from None
    return text


def _unquoted(text: str) -> str:
    """Return a text without quotes around all of it; JSON in a JSON string is read."""
    if text[:1] == '"':
        try:
            value: object = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return value.strip() if isinstance(value, str) else text
    inner = text[1:-1]
    return inner.strip() if text[:1] + text[-1:] in ("“”", "「」") and not set("“”「」") & set(inner) else text


def read_strict(reply: str) -> list[Pair]:
    """Return the pairs of a reply that is exactly the JSON asked for.

    Raises:
        InvalidReply: it is anything else.
    """
    try:
        return validated(json.loads(reply, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        raise InvalidReply(f"not JSON: {error}") from None


def read_pairs(reply: str) -> list[Pair]:
    """Return the pairs of a reply, also from within prose or code fences, or cut off at the end.

    All readings that the schema allows are collected; a repair counts only if there is exactly one. In a reply that
    was cut off, the complete pairs are kept and the incomplete one is dropped.

    Raises:
        InvalidReply: no reading is valid, or several are.
    """
    text = read_text(reply)
    try:
        return read_strict(text)
    except InvalidReply as error:
        reason = error
    readings: list[list[Pair]] = []
    for value in _values(text):
        try:
            pairs = validated(value)
        except InvalidReply as error:
            reason = error
        else:
            readings += [pairs] if pairs not in readings else []
    if len(readings) > 1:
        raise InvalidReply(f"there are {len(readings)} different JSON objects in the reply; write one")
    if not readings:
        raise InvalidReply(str(reason))
    return readings[0]


def validated(value: object) -> list[Pair]:
    """Return the pairs that a JSON value holds.

    Raises:
        InvalidReply: the value is not as SCHEMA says, or holds no pair.
    """
    items = _items(value)
    if not isinstance(items, list) or not items:
        raise InvalidReply('"pairs" must be a list with at least one pair')
    pairs: list[Pair] = []
    for i, item in enumerate(cast(list[object], items)):
        found = _fields(item, {"question", "answer"}, f"pairs[{i}]")
        for name, text in found.items():
            if not isinstance(text, str) or not text.strip():
                raise InvalidReply(f"pairs[{i}].{name} must be a string that is not empty")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidReply(f"pairs[{i}].{name} holds half a character (a lone surrogate)") from None
        pairs.append(Pair(str(found["question"]).strip(), str(found["answer"]).strip()))
    return pairs


def _items(value: object) -> object:
    """Return the list of pairs, under whatever name it stands alone."""
    fields = cast(dict[str, object], value) if isinstance(value, dict) else {}
    lists = [item for item in fields.values() if isinstance(item, list)]
    if "pairs" not in fields and len(lists) == 1:
        return lists[0]
    return _fields(value, {"pairs"}, "the reply")["pairs"]


def _fields(value: object, names: set[str], where: str) -> dict[str, object]:
    """Return the fields that were asked for; others are not read."""
    if not isinstance(value, dict) or not names <= set(cast(dict[str, object], value)):
        quoted = " and ".join(f'"{name}"' for name in sorted(names))
        raise InvalidReply(f"{where} must be a JSON object with {quoted}")
    return {name: cast(dict[str, object], value)[name] for name in sorted(names)}


def _object(items: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(items)
    if len(fields) != len(items):
        raise ValueError("a name stands in an object twice")
    return fields


def _values(text: str) -> Iterator[object]:
    """Yield the JSON values that begin in the text, each outside the one before; the last one may be cut off.

    A list stands for the object it lacks around it.
    """
    start, tried = _opening(text, 0), 0
    while start >= 0 and tried < MAX_READINGS:
        tried += 1
        end, whole = _extent(text, start)
        value = _load(text[start:end] if whole else _complete_part(text[start:end]))
        if value is None:
            start = _opening(text, start + 1)
        else:
            yield {"pairs": value} if isinstance(value, list) else value
            start = _opening(text, end)


def _opening(text: str, start: int) -> int:
    found = re.compile(r"\{|\[(?=\s*\{)").search(text, start)
    return found.start() if found else -1


def _depths(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield each bracket outside strings: where it stands, which it is, and how deep the text is after it."""
    depth, in_string, skip = 0, False, False
    for i, character in enumerate(text):
        if skip:
            skip = False
        elif in_string:
            skip, in_string = character == "\\", character != '"'
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
            yield i, character, depth
        elif character in "}]":
            depth -= 1
            yield i, character, depth


def _extent(text: str, start: int) -> tuple[int, bool]:
    """Return where the value that begins at `start` ends, and whether it does before the text is cut off."""
    for i, _, depth in _depths(text[start:]):
        if depth == 0:
            return start + i + 1, True
    return len(text), False


def _complete_part(text: str) -> str:
    """Return `{"pairs": [{...}, {...}, {...` up to its last whole pair, closed; "" if there is none."""
    depth_around, closing = (2, "]}") if text.startswith("{") else (1, "]")
    ends = [i + 1 for i, bracket, depth in _depths(text) if bracket == "}" and depth == depth_around]
    return text[: ends[-1]] + closing if ends else ""


def _load(text: str) -> object:
    """Return the JSON value of a text, trailing commas and raw line ends in its strings mended; None if it is none."""
    try:
        return json.loads(STRING_OR_COMMA.sub(_mended, text), object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return None


def _mended(found: re.Match[str]) -> str:
    if found[0] == ",":
        return ""
    return found[0].replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
