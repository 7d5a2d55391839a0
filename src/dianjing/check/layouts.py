"""A record of another layout -> the same as LLaVA has it."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from dianjing.check.fixes import ROLES, SYSTEM_ROLES, picture_table
from dianjing.constants import IMAGE_MARKER
from dianjing.data.marks import MEDIA_KEYS
from dianjing.data.record import SYSTEM_KEYS
from dianjing.errors import DataError

Source = str | bytes
"""A picture: its path, data URI, or bytes."""
Fields = Mapping[str, object]

CAPTION_QUESTION = "Describe the picture."
MESSAGES = ("messages", "conversations", "conversation", "texts")
QUESTIONS = ("question", "query", "instruction", "prompt", "problem")
ANSWERS = ("answer", "response", "output", "multiple_choice_answer", "completion", "answers")
CAPTIONS = ("caption", "captions", "text", "txt", "description", "sentence", "sentences", "raw")
CHOICES = ("choices", "options")
PICTURES = (
    *("image", "images", "img", "image_path", "img_path", "image_file", "image_name", "img_name", "file_name"),
    *("filename", "picture", "pictures", "jpg", "jpeg", "png", "webp", "image_id"),
)
KEPT = ("type", "types")
NAMES = ("id", "__key__", "question_id", "qid", "uid")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


@dataclass(kw_only=True)
class Converting:
    """A record on its way: messages with markers, and its pictures."""

    id: str
    messages: list[dict[str, object]] = field(default_factory=list[dict[str, object]])
    pictures: list[Source] = field(default_factory=list[Source])
    fields: dict[str, object] = field(default_factory=dict[str, object])
    """Those that go into the record as they are."""


def layout_of(row: Fields) -> str:
    """Return the name of a record's layout.

    Raises:
        DataError: it is not known.
    """
    if "texts" in row and _listed(row["texts"]):
        return "texts of user and assistant"
    messages = next((key for key in MESSAGES if row.get(key) == [] or _listed(row.get(key))), "")
    if messages:
        return _layout_of_messages(messages, row)
    question, answer = _first(row, QUESTIONS), _first(row, ANSWERS)
    if question and answer:
        return f"{question} and {answer}"
    if not question and not any(key in row for key in CHOICES) and (caption := _first(row, CAPTIONS) or answer):
        return f"pictures with {caption}"
    keys = ", ".join(row) or "none"
    if {"chosen", "rejected"} <= row.keys():
        raise DataError(f"answers to choose from (keys {keys}); a run learns one answer: keep the chosen ones")
    if "annotations" in row and "data" in row:
        raise DataError(f"Label Studio's own JSON (keys {keys}); export JSON-MIN from it, with a caption or question")
    if question:
        raise DataError(f"questions without answers (keys {keys}); they stand in another file: join the two")
    raise DataError(
        f"its layout is not known (keys {keys}); messages, question and answer, or captions are read: rename the "
        f"columns to question and answer, or to caption"
    )


def _layout_of_messages(key: str, row: Fields) -> str:
    first = next(iter(_listed(row[key])), None)
    if isinstance(first, Mapping) and {"input", "output"} <= first.keys():
        return "XTuner's turns of input and output"
    if key == "messages":
        return "OpenAI messages"
    return "LLaVA" if isinstance(row.get("image"), str | list) or "images" not in row else "ShareGPT"


def _listed(value: object) -> Sequence[Any]:
    """Return a list, also from its JSON text; an empty one for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return cast(Sequence[Any], value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def _first(row: Fields, keys: Sequence[str]) -> str:
    """Return the first of some keys that has a value."""
    return next((key for key in keys if row.get(key) is not None), "")


def converted_rows(name: str, row: Fields, notices: Counter[str]) -> list[Converting]:
    """Return the records that a row stands for: one, or one for each of its captions.

    Raises:
        DataError: it holds none, or something that is not read.
    """
    found = Converting(id=name, fields={key: row[key] for key in KEPT if row.get(key) is not None})
    pictures = next((key for key in ("pictures", *PICTURES) if row.get(key) not in (None, "", [])), "")
    found.pictures = sources(row.get(pictures))
    if pictures == "image_id":
        found.pictures = [one if isinstance(one, bytes) or "." in one else f"{one}.jpg" for one in found.pictures]
    if medium := next((key for key in MEDIA_KEYS & row.keys() if row[key]), ""):
        raise DataError(f'"{medium}" names a medium that is not read')
    if any(row.get(key) for key in SYSTEM_KEYS):
        notices["system texts left out: LLaVA JSON has none"] += 1
    messages = next((key for key in MESSAGES if _listed(row.get(key))), "")
    used = {pictures, messages, *KEPT, *SYSTEM_KEYS, *NAMES}
    rows = [found]
    question, answer = _first(row, QUESTIONS), _first(row, ANSWERS)
    if messages:
        for message in _listed(row[messages]):
            _add(found, message, notices)
    elif question and answer:
        used |= {question, answer, "history", "input", *CHOICES}
        _add_pair(found, row, question, answer, notices)
    else:
        caption = _first(row, CAPTIONS) or answer
        used.add(caption)
        rows = _captioned(found, row.get(caption), notices)
    for key in row.keys() - used:
        if row[key] not in (None, "", []):
            notices[f'records whose "{key}" was left out'] += 1
    return rows


def _captioned(found: Converting, value: object, notices: Counter[str]) -> list[Converting]:
    values = [value] if isinstance(value, str) else [one for one in _listed(value) if isinstance(one, str)]
    if not values:
        raise DataError("it has neither messages nor a caption")
    notices[f'captions, asked for with "{CAPTION_QUESTION}"'] += len(values)
    return [
        Converting(
            id=found.id if len(values) == 1 else f"{found.id}-{number}",
            messages=[{"from": "human", "value": CAPTION_QUESTION}, {"from": "gpt", "value": caption}],
            pictures=found.pictures,
            fields=found.fields,
        )
        for number, caption in enumerate(values)
    ]


def _add_pair(found: Converting, row: Fields, question: str, answer: str, notices: Counter[str]) -> None:
    """Add a question and its answer, with the turns before them."""
    for pair in _listed(row.get("history")):
        if len(_listed(pair)) != 2:
            raise DataError("history is not a list of pairs of question and answer")
        for role, text in zip(("human", "gpt"), _listed(pair), strict=True):
            found.messages.append({"from": role, "value": text})
    if any(row.get(key) for key in CHOICES) and not isinstance(row[answer], str):
        raise DataError(f"{answer} is a number of a choice; write the answer itself, and the choices into the question")
    asked = "\n".join(str(row[key]) for key in (question, "input") if row.get(key))
    if any(row.get(key) for key in CHOICES):
        notices["records whose choices were left out; write them into the question if they are asked for"] += 1
    said = _answer(row[answer], notices)
    found.messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]


def _answer(value: object, notices: Counter[str]) -> object:
    """Return an answer as text: of several people's, the one that most gave."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    several = [one.get("answer") if isinstance(one, Mapping) else one for one in _listed(value)]
    texts = [one for one in cast(list[object], several) if isinstance(one, str)]
    if not texts:
        return value
    if len(texts) > 1:
        notices["answers chosen from several: the most frequent"] += 1
    return Counter(texts).most_common(1)[0][0]


def _add(found: Converting, message: object, notices: Counter[str]) -> None:
    """Add a message, or a whole turn of another program."""
    if not isinstance(message, Mapping):
        raise DataError("a message is not an object")
    fields = cast(Fields, message)
    if "role" in fields or "from" in fields:
        _add_message(found, fields, notices)
        return
    for asked, said in (("user", "assistant"), ("input", "output"), ("human", "assistant")):
        if asked in fields and said in fields:
            if fields.get("system"):
                notices["system texts left out: LLaVA JSON has none"] += 1
            _add_message(found, {"role": "human", "content": fields[asked]}, notices)
            _add_message(found, {"role": "gpt", "content": fields[said]}, notices)
            return
    raise DataError(f"a message has neither role nor from (keys {', '.join(fields)})")


def _add_message(found: Converting, message: Fields, notices: Counter[str]) -> None:
    said = message.get("role", message.get("from"))
    role = ROLES.get(said.strip().lower(), said) if isinstance(said, str) else said
    if role in SYSTEM_ROLES:
        notices["system messages left out: LLaVA JSON has none"] += 1
        return
    content = message.get("content", message.get("value"))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(found, part) for part in cast(Sequence[Any], content))
    weights = {key: message[key] for key in ("loss", "weight") if message.get(key) is not None}
    found.messages.append({"from": role, "value": content, **weights})


def _part(found: Converting, part: object) -> str:
    """Return a part of a message as text; a picture is added to the record's."""
    fields = cast(Mapping[str, Any], part) if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind in ("text", "input_text", "output_text"):
        return str(fields.get("text") or "")
    source = fields.get("image_url") if kind in ("image_url", "input_image") else fields.get("image")
    if kind not in ("image_url", "input_image", "image"):
        raise DataError(f'a part of a message is of the type "{kind}"; text and pictures are read')
    if isinstance(source, Mapping):
        source = cast(Mapping[str, object], source).get("url", source)
    pictures = sources(source)
    found.pictures += pictures
    return f"{IMAGE_MARKER}\n" * len(pictures)


def sources(value: object) -> list[Source]:
    """Return the pictures that a field names: a path, a data URI, bytes, Hugging Face's struct, or a list of them."""
    if value is None:
        return []
    if isinstance(value, str):
        return [_of_text(value)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, int):  # COCO's numbers
        return [str(value)]
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        if table := picture_table(fields):
            return [*table]
        if fields.keys().isdisjoint(("bytes", "path", "url")):
            raise DataError(f"a picture has neither bytes nor path nor url (keys {', '.join(fields)})")
        return sources(fields.get("bytes") or fields.get("path") or fields.get("url"))
    if isinstance(value, Iterable):
        return [source for one in cast(Iterable[object], value) for source in sources(one)]
    raise DataError("a picture is neither a path nor bytes")


def _of_text(text: str) -> Source:
    """Return a path as it is, and base64 without a data URI as the bytes it stands for."""
    if not _BASE64.fullmatch(text):
        return text
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        return text
