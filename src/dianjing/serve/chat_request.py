"""A chat request -> the same request, made safe: only known fields, every picture decoded and written again."""

from __future__ import annotations

import base64
import io
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from dianjing.constants import IMAGE_MARKER
from dianjing.errors import DataError
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.serve.guard import Refusal

MAX_PICTURES = 16
ANSWER_TOKENS = 1024
"""Longest answer to a request that names no limit, as far as the model's positions reach."""
SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character, which JSON can write and no tokenizer can read."""
DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ContextWindow:
    """The positions of a model, which prompt and answer share."""

    positions: int
    picture: int
    """Positions of one picture."""
    processor: Any
    """Its chat template and its tokenizer, as transformers has them."""
    rule: PictureRule = PLAIN
    """How the model reads the files of pictures."""

    def taken(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Return how many positions a prompt takes, its pictures included.

        Raises:
            Refusal: it takes more than there are, or the model's chat template refuses it.
        """
        said = [{"role": one["role"], "content": _template_parts(one["content"])} for one in messages]
        parts = [part for one in said for part in one["content"]]
        characters = sum(len(part.get("text", "")) for part in parts)
        tokenizer = self.processor.tokenizer
        longest = max(map(len, tokenizer.get_vocab()))
        if max(len(said), len(parts), characters / longest) > self.positions:
            raise Refusal(400, f"the messages are longer than the {self.positions} positions of the model; send less")
        try:
            text = self.processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise Refusal(400, f"messages: the model's chat template refuses them: {error}") from None
        pictures = sum(part["type"] == "image" for part in parts)
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) + pictures * (self.picture - 1)


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most  # NaN is neither


def _is_temperature(value: Any) -> bool:
    return _is_number(value, 0, 0) or _is_number(value, 1e-4, 2)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 4 and all(_is_text(text) and 1 <= len(text) <= 100 for text in texts)


VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object"),
    "max_tokens": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "max_completion_tokens": (lambda value: type(value) is int and value > 0, "a whole number of at least 1"),
    "temperature": (_is_temperature, "0, or a number from 0.0001 to 2,"),
    "top_p": (lambda value: _is_number(value, 1e-9, 1), "a number above 0, at most 1,"),
    "seed": (lambda value: type(value) is int and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "stop": (_is_stop, "a text, or up to four, each of 1 to 100 characters,"),
    "frequency_penalty": (lambda value: _is_number(value, -0.99, 2), "a number from -0.99 to 2"),
    "user": (_is_text, "text"),
}
"""Field -> whether it may have a value, and the values it may have, in words; null is as if it were not there."""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": [1],
    "presence_penalty": [0],
    "repetition_penalty": [1],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "modalities": [["text"]],
    "metadata": [{}],
    "store": [False],
    "service_tier": ["auto", "default"],
}
"""Field of OpenAI's API -> the values with which it asks for nothing: many clients send them by themselves."""
FIELDS = ("model", "messages", *VALUES)
"""All that a request may hold; transformers ignores the others, or lets them replace the prompt."""


def safe_request(body: bytes, model: str, window: ContextWindow) -> bytes:
    """Return a chat request as it may be passed on, its pictures decoded and written again.

    Raises:
        Refusal: it asks for something else, or is broken.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refusal(400, "the request must be a JSON object")
    request = {name: value for name, value in request.items() if not _asks_for_nothing(name, value)}
    if unknown := sorted(set(request) - set(FIELDS)):
        raise Refusal(400, f"not supported: {', '.join(unknown)}; a request may hold {', '.join(FIELDS)}")
    if request.get("model", model) != model:
        raise Refusal(404, f"this server has only the model {model!r}")
    for name, (allowed, wanted) in VALUES.items():
        if name in request and not allowed(request[name]):
            raise Refusal(400, f"{name}: {wanted} is needed, not {json.dumps(request[name])[:60]}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of messages")
    pictures = [0]
    safe = [_safe_message(number, message, pictures, window.rule) for number, message in enumerate(messages)]
    if safe[-1]["role"] != "user":
        raise Refusal(400, "the last message must be the user's")
    asked = request.pop("max_completion_tokens", request.get("max_tokens"))
    limits = {"max_tokens": _answer_tokens(asked, window.taken(safe), window.positions)}
    # Without a temperature the answer is the likeliest one, as in `dianjing chat`.
    return json.dumps({"temperature": 0, **request, **limits, "model": model, "messages": safe}).encode()


def stop_texts(request: bytes) -> list[str]:
    """Return the texts that end the answer to a safe request."""
    stop = json.loads(request).get("stop", [])
    return [stop] if isinstance(stop, str) else stop


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Return whether a request would be the same without this field."""
    known = name in NEUTRAL or name in FIELDS
    neutral = NEUTRAL.get(name, ())
    # True == 1 in Python, but not in JSON.
    return known and (
        value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
    )


def _answer_tokens(asked: int | None, taken: int, positions: int) -> int:
    """Return how long the answer may become."""
    left = positions - taken
    used = f"the messages take {taken} of the model's {positions} positions, pictures included"
    if left < 1:
        raise Refusal(400, f"{used}; send less, or start a new conversation")
    if asked and asked > left:
        raise Refusal(400, f"max_tokens is {str(asked)[:30]}, but {used}; ask for at most {left}")
    return asked or min(ANSWER_TOKENS, left)


def _template_parts(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return a message's content as chat templates read it."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"type": "text", "text": part["text"]} if "text" in part else {"type": "image"} for part in parts]


def _safe_message(number: int, message: Any, pictures: list[int], rule: PictureRule) -> dict[str, Any]:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or set(message) - {"role", "content"}:
        raise Refusal(400, f"{where}: a message holds role and content, nothing else")
    if message.get("role") not in ("user", "assistant"):
        raise Refusal(400, f"{where}: the role must be user or assistant; the model was trained with no other")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": _safe_text(where, content)}
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"{where}: content must be text or a list of parts")
    parts = [_safe_part(f"{where}.content[{i}]", part, pictures, rule) for i, part in enumerate(content)]
    return {"role": message["role"], "content": parts}


def _safe_part(where: str, part: Any, pictures: list[int], rule: PictureRule) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _safe_text(where, part["text"])}
    if kind != "image_url":
        raise Refusal(400, f"{where}: a part is of type text or image_url")
    address = part.get("image_url")
    url = address.get("url") if isinstance(address, dict) else address
    if not isinstance(url, str) or not (found := DATA_URI.match(url)):
        raise Refusal(
            400,
            f"{where}: a picture must be sent inside the request, as data:image/png;base64,...; "
            "files and addresses are not opened",
        )
    pictures[0] += 1
    if pictures[0] > MAX_PICTURES:
        raise Refusal(400, f"{where}: more than {MAX_PICTURES} pictures in one request")
    return {"type": "image_url", "image_url": {"url": _as_png(where, url[found.end() :], rule)}}


def _safe_text(where: str, text: str) -> str:
    if SURROGATE.search(text):
        raise Refusal(400, f"{where}: half a character (a lone surrogate) is in the text; send it as valid Unicode")
    if IMAGE_MARKER in text:
        raise Refusal(400, f"{where}: {IMAGE_MARKER} in a text; send the picture as a part of type image_url")
    return text


def _as_png(where: str, encoded: str, rule: PictureRule) -> str:
    """Return a picture as a data URI of a plain RGB PNG, read with the same care as a training picture."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            Path(folder, "picture").write_bytes(base64.b64decode(encoded, validate=True))
            image = load_image(folder, "picture", rule)
        except (ValueError, DataError) as error:  # what is not ASCII is not base64 either
            raise Refusal(400, f"{where}: {error}") from None
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
