"""The questions put to the endpoint, each with its key in the journal and the body that is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dianjing.make.pictures import JPEG_QUALITY, Picture
from dianjing.make.prompts import Form, Language, Prompt
from dianjing.make.replies import SCHEMA, SCHEMA_NAME

Rung = Literal["json_schema", "json_object", "text"]
"""How JSON is asked for, from the strictest that a server may know to the one that all know."""
RUNGS: tuple[Rung, ...] = ("json_schema", "json_object", "text")
TokenLimit = Literal["max_tokens", "max_completion_tokens"]

BLIND = {
    "en": "You are asked about a picture that you cannot see. Give the most likely answer, in one short sentence.\n\n",
    "zh": "有人问你一张你看不到的图片。请用一句简短的话给出最可能的回答。\n\n",
}
AGAIN = {
    "en": "That reply cannot be used: {error}. Answer the request above again, exactly in the form it asks for.",
    "zh": "这个回复无法使用：{error}。请严格按照上面要求的格式重新回答。",
}
BLIND_PROMPT = "blind_check"
ADDED = ("white", "extra_body")
"""Parameters that came later: a key does not hold one that is not given, so that old journals stay valid."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The settings sent with every message."""

    model: str
    max_tokens: int = 1024
    """Longest reply."""
    temperature: float | None = None
    """None: the endpoint's own."""
    long_edge: int = 1024
    """Longer side of a picture as it is sent, in pixels."""
    white: int = 0
    """The value that is white in pictures of more than 8 bits which name none; 0 = not known."""
    extra_body: str = ""
    """Further fields of a vendor, as the JSON text of an object."""

    @property
    def shown(self) -> tuple[int, int]:
        """Return what decides how a picture is sent: its longer side, the value that is white."""
        return self.long_edge, self.white


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The features that an endpoint understands."""

    rung: Rung = "json_schema"
    token_limit: TokenLimit = "max_tokens"
    stream: bool = False
    """Replies come in pieces: some endpoints have no other way."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One message, with or without a picture."""

    key: str
    picture: Picture | None
    prompt: str
    language: Language | None
    index: int
    """Which of its prompt's texts this is."""
    text: str
    reply: Form


def plan(pictures: Iterable[Picture], prompts: Sequence[Prompt], parameters: Parameters) -> list[Request]:
    """Return every request, in the order of the records: by picture, prompt, text."""
    return [
        _request(picture, prompt.name, prompt.language, index, text, prompt.reply, parameters)
        for picture in pictures
        for prompt in prompts
        for index, text in enumerate(prompt.texts)
    ]


def blind_request(question: str, language: Language | None, parameters: Parameters) -> Request:
    """Return the request that puts a question without its picture."""
    return _request(None, BLIND_PROMPT, language, 0, BLIND[language or "en"] + question, "text", parameters)


def _request(
    picture: Picture | None,
    prompt: str,
    language: Language | None,
    index: int,
    text: str,
    reply: Form,
    parameters: Parameters,
) -> Request:
    """Return a request; its key is a hash of all that decides the answer, so that no answer is paid for twice.

    How JSON is asked for is left out on purpose: what an endpoint understands does not change the question.
    """
    identity = {
        "image": picture and picture.sha256,
        "text": text,
        **{name: value for name, value in asdict(parameters).items() if name not in ADDED or value},
        "jpeg_quality": JPEG_QUALITY,
        "schema": SCHEMA if reply == "pairs" else None,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return Request(key=key, picture=picture, prompt=prompt, language=language, index=index, text=text, reply=reply)


def body(
    request: Request,
    image: str | None,
    parameters: Parameters,
    dialect: Dialect,
    rejected: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Return the chat completion request as the endpoint gets it.

    `image` is the picture's data URI; `rejected` an earlier reply and what was wrong with it.
    """
    shown = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*shown, {"type": "text", "text": request.text}]}]
    if rejected:
        reply, error = rejected
        again = AGAIN[request.language or "en"].format(error=error)
        messages += [{"role": "assistant", "content": reply}] if reply.strip() else []
        messages += [{"role": "user", "content": again}] if reply.strip() else []
    fields: dict[str, Any] = {
        "model": parameters.model,
        "messages": messages,
        dialect.token_limit: parameters.max_tokens,
    }
    if parameters.temperature is not None:
        fields["temperature"] = parameters.temperature
    if request.reply == "pairs" and dialect.rung == "json_schema":
        schema = {"name": SCHEMA_NAME, "strict": True, "schema": SCHEMA}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif request.reply == "pairs" and dialect.rung == "json_object":
        fields["response_format"] = {"type": "json_object"}
    if dialect.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return fields | (json.loads(parameters.extra_body) if parameters.extra_body else {})
