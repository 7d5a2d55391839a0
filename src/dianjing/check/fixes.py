"""Corrections that are certain: in the text of a record or in its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dianjing.constants import IMAGE_MARKER

ROLES = {
    **dict.fromkeys(("human", "user", "asker"), "human"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatbot", "model", "ai"), "gpt"),
}
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
    messages = fields.get("conversations")
    if isinstance(messages, list):
        fields["conversations"] = [
            _message(message, f"conversations[{i}]", changes) for i, message in enumerate(cast(list[object], messages))
        ]
        _place_picture(fields, changes)
    name = fields.get("id")
    if name is None:
        changes.append(Change("id_missing", "id", None, str(index)))
        fields = {"id": str(index), **{key: item for key, item in fields.items() if key != "id"}}
    elif isinstance(name, int) and not isinstance(name, bool):
        changes.append(Change("id_not_string", "id", name, str(name)))
        fields["id"] = str(name)
    return fields, changes


def _renamed(
    fields: Mapping[str, object], old: str, new: str, code: str, changes: list[Change], where: str = ""
) -> dict[str, object]:
    """Return the fields with one key renamed in its place."""
    changes.append(Change(code, where + old, old, new))
    return {new if key == old else key: item for key, item in fields.items()}


def _message(message: object, name: str, changes: list[Change]) -> object:
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
    return fields


def _place_picture(fields: dict[str, object], changes: list[Change]) -> None:
    """Put the marker of an only picture in front of the first question, where LLaVA has it."""
    messages: Any = fields["conversations"]
    if not _are_messages(messages) or len(_pictures(fields.get("image"))) != 1:
        return
    if any(IMAGE_MARKER in message["value"] for message in messages):
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
