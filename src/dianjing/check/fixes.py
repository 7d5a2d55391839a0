"""Corrections that are certain: in the text of a record or in its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dianjing.constants import IMAGE_MARKER
from dianjing.data.marks import FOREIGN_MARK, NAMED_PICTURE

ROLES = {
    **dict.fromkeys(("human", "user", "asker"), "human"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatbot", "model", "ai"), "gpt"),
}
SYSTEM_ROLES = ("system", "developer")
MOST_CHANGES = 1000
"""In the text of one record."""
_COMMENT = r"//[^\n]*+|/\*.*?\*/"
_PART = re.compile(
    rf'"(?>[^"\\]++|\\.)*+"|(?P<comment>{_COMMENT})|(?P<comma>,)(?=(?>\s|{_COMMENT})*+[\]}}])', re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Change:
    """One correction of a record."""

    code: str
    field: str
    before: object
    after: object
    offset: int = -1
    """Where in the text of the record it is; -1 for a change of a field."""


def read_value(text: str) -> tuple[object, list[Change]]:
    """Return the JSON value of a text, and what had to be mended to read it.

    Raises:
        ValueError, RecursionError: it cannot be read all the same.
    """
    try:
        return json.loads(text), []
    except ValueError as error:
        mended, changes = _mend(text)
        if not changes:
            raise
        try:
            return json.loads(mended), changes
        except ValueError:
            raise error from None


def _mend(text: str) -> tuple[str, list[Change]]:
    """Blank out comments and commas before a closing bracket; every other character stays where it is.

    Raises:
        ValueError: there are too many.
    """
    changes: list[Change] = []

    def blank(part: re.Match[str]) -> str:
        if part.lastgroup is None:
            return part.group()
        if len(changes) == MOST_CHANGES:
            raise ValueError(f"more than {MOST_CHANGES:,} comments and commas too many")
        code = "json_comment" if part.lastgroup == "comment" else "json_trailing_comma"
        changes.append(Change(code, "", part.group()[:60], "", part.start()))
        return re.sub(r"[^\n]", " ", part.group())

    return _PART.sub(blank, text), changes


def corrected(value: Mapping[str, object], index: int) -> tuple[dict[str, object], list[Change]]:
    """Return a record with all that is certain corrected, and the list of changes."""
    fields = dict(value)
    changes: list[Change] = []
    if _pictures(fields.get("images")) and not fields.get("image"):
        fields.pop("image", None)
        fields = _renamed(fields, "images", "image", "images_key", changes)
    if "conversations" not in fields:
        for key, code in (("conversation", "conversation_key"), ("messages", "messages_key")):
            if isinstance(fields.get(key), list):
                fields = _renamed(fields, key, "conversations", code, changes)
                break
    if table := picture_table(fields.get("image")):
        changes.append(Change("image_table", "image", fields["image"], table))
        fields["image"] = table
    if fields.get("image") == "":
        changes.append(Change("image_empty", "image", "", None))
        del fields["image"]
    messages = fields.get("conversations")
    if isinstance(messages, list):
        read = [
            _message(message, f"conversations[{i}]", changes) for i, message in enumerate(cast(list[object], messages))
        ]
        fields["conversations"] = [message for message in read if message is not None]
        if _are_messages(fields["conversations"]):
            _take_named_pictures(fields, changes)
            _replace_marks(fields, changes)
            _place_picture(fields, changes)
    name = fields.get("id")
    if name is None:
        changes.append(Change("id_missing", "id", None, str(index)))
        fields = {"id": str(index), **{key: item for key, item in fields.items() if key != "id"}}
    elif (isinstance(name, int) and not isinstance(name, bool)) or (isinstance(name, float) and name.is_integer()):
        changes.append(Change("id_not_string", "id", name, str(int(name))))
        fields["id"] = str(int(name))
    return fields, changes


def picture_table(value: object) -> list[str]:
    """Return the paths of MiniCPM's table from numbered marks to pictures; none for anything else."""
    if not isinstance(value, dict) or not value:
        return []
    table = cast(dict[str, object], value)
    marks = [FOREIGN_MARK.fullmatch(mark) for mark in table]
    if not all(marks) or not all(isinstance(path, str) and path for path in table.values()):
        return []
    ordered = sorted(zip(marks, table.values(), strict=True), key=lambda pair: int((pair[0] or {})["angled"] or 0))
    return [str(path) for _, path in ordered]


def _renamed(
    fields: Mapping[str, object], old: str, new: str, code: str, changes: list[Change], where: str = ""
) -> dict[str, object]:
    """Return the fields with one key renamed in its place."""
    changes.append(Change(code, where + old, old, new))
    return {new if key == old else key: item for key, item in fields.items()}


def _message(message: object, name: str, changes: list[Change]) -> object:
    """Return a message with its keys and role as LLaVA has them; None for one of the system, which has no place."""
    if not isinstance(message, dict):
        return message
    fields = cast(dict[str, object], message)
    if "from" not in fields and isinstance(fields.get("role"), str) and isinstance(fields.get("content"), str):
        renames = {"role": "from", "content": "value"}
        changes.append(Change("role_content", name, "role, content", "from, value"))
        fields = {renames.get(key, key): item for key, item in fields.items()}
    role = fields.get("from")
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known and known != role:
        changes.append(Change("role_alias", f"{name}.from", role, known))
        fields = {**fields, "from": known}
    if isinstance(role, str) and role.strip().lower() in SYSTEM_ROLES and isinstance(fields.get("value"), str):
        changes.append(Change("role_unknown", name, fields, None))
        return None
    return fields


def _take_named_pictures(fields: dict[str, object], changes: list[Change]) -> None:
    """Move the paths that questions name in marks of their own to `image`, in their order."""
    messages = cast(list[dict[str, str]], fields["conversations"])
    asked = [(i, message["value"]) for i, message in enumerate(messages) if message["from"] == "human"]
    if fields.get("image") or any(IMAGE_MARKER in message["value"] for message in messages):
        return
    names = [found["path"].strip() for _, text in asked for found in NAMED_PICTURE.finditer(text)]
    if not names:
        return
    for i, before in asked:
        after = NAMED_PICTURE.sub(IMAGE_MARKER, before)
        if after != before:
            messages[i] = {**messages[i], "value": after}
            changes.append(Change("picture_in_text", f"conversations[{i}].value", before, after))
    fields["image"] = names[0] if len(names) == 1 else names
    changes.append(Change("picture_in_text", "image", None, fields["image"]))


def _replace_marks(fields: dict[str, object], changes: list[Change]) -> None:
    """Write `<image>` for the placeholders of other programs, where they are as many as the pictures.

    Numbered ones may stand in another order than the pictures, which are then put into theirs.
    """
    messages = cast(list[dict[str, str]], fields["conversations"])
    pictures = _pictures(fields.get("image"))
    asked = [(i, message["value"]) for i, message in enumerate(messages) if message["from"] == "human"]
    if sum(text.count(IMAGE_MARKER) for _, text in asked) == len(pictures):
        return
    marks = [mark for _, text in asked for mark in FOREIGN_MARK.finditer(text)]
    if len(marks) != len(pictures) or not pictures:
        return
    numbers = [int(mark["angled"] or mark["square"] or -1) for mark in marks]
    first = min(numbers)
    numbered = sorted(numbers) == list(range(first, first + len(marks))) and first in (0, 1)
    if len(marks) > 1 and not numbered and max(numbers) >= 0:
        return
    for i, before in asked:
        after = FOREIGN_MARK.sub(IMAGE_MARKER, before)
        if after != before:
            messages[i] = {**messages[i], "value": after}
            changes.append(Change("marker_foreign", f"conversations[{i}].value", before, after))
    if numbered and numbers != sorted(numbers):
        ordered = [pictures[number - first] for number in numbers]
        changes.append(Change("marker_foreign", "image", fields["image"], ordered))
        fields["image"] = ordered


def _place_picture(fields: dict[str, object], changes: list[Change]) -> None:
    """Put the marker of an only picture in front of the first question, where LLaVA has it."""
    messages: Any = fields["conversations"]
    if len(_pictures(fields.get("image"))) != 1:
        return
    if any(FOREIGN_MARK.search(message["value"]) for message in messages):  # of any spelling, so that none is doubled
        return
    asked = next((i for i, message in enumerate(messages) if message["from"] == "human"), None)
    if asked is None:
        return
    before = messages[asked]["value"]
    after = f"{IMAGE_MARKER}\n{before}"
    messages[asked] = {**messages[asked], "value": after}
    changes.append(Change("marker_missing", f"conversations[{asked}].value", before, after))


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("from"), str) and isinstance(message.get("value"), str)
        for message in cast(list[dict[str, object]], value)
    )


def _pictures(value: object) -> Sequence[str]:
    """Return the paths of an `image` field; none unless it is a path or a list of them."""
    values = cast(list[object], value) if isinstance(value, list) else [value]
    names = [name for name in values if isinstance(name, str) and name]
    return names if len(names) == len(values) else ()


def with_names(
    fields: Mapping[str, object], names: Mapping[str, tuple[str, str]]
) -> tuple[dict[str, object], list[Change]]:
    """Return a record whose picture paths are replaced as `names` says: path -> (code, new path)."""
    changes: list[Change] = []

    def renamed() -> Iterator[str]:
        for name in _pictures(fields.get("image")):
            code, new = names.get(name, ("", name))
            if code:
                changes.append(Change(code, "image", name, new))
            yield new

    pictures = list(renamed())
    if not changes:
        return dict(fields), []
    return {**fields, "image": pictures if isinstance(fields["image"], list) else pictures[0]}, changes
