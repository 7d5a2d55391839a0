"""Answers of transformers' server -> the same answers as OpenAI's API gives them: no stop text, no blanks around."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Send


class AnswerText:
    """Passes an answer on piece by piece, up to the first stop text in it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        self._sent = 0

    def more(self, piece: str) -> str:
        """Return what may be sent now: what could still become a stop text, and blanks at the end, wait."""
        self._text = (self._text + piece) if self._text else piece.lstrip()
        kept = min(map(self._kept, self._stops), default=len(self._text))
        ready = self._text[:kept].rstrip()
        new, self._sent = ready[self._sent :], max(self._sent, len(ready))
        return new

    def end(self) -> str:
        """Return what is left when nothing follows."""
        rest = min((self._text.partition(stop)[0] for stop in self._stops), key=len, default=self._text)
        return rest.rstrip()[self._sent :]

    def _kept(self, stop: str) -> int:
        """Return how many characters stand before a stop text, or before what may be the beginning of one."""
        if (found := self._text.find(stop)) >= 0:
            return found
        open_ends = (n for n in range(min(len(stop) - 1, len(self._text)), 0, -1) if self._text.endswith(stop[:n]))
        return len(self._text) - next(open_ends, 0)


@dataclass(kw_only=True)
class Tidy:
    """Stands before `send` and changes the text of an answer, whole or streamed, and nothing else."""

    send: Send
    stops: Sequence[str]
    _start: Message | None = None
    _streamed: bool = False
    _body: bytes = b""
    _texts: dict[int, AnswerText] = field(default_factory=dict[int, AnswerText])
    """By the number of the choice."""

    async def __call__(self, message: Message) -> None:
        """Send a message of the server on."""
        if message["type"] == "http.response.start":
            self._streamed = MutableHeaders(scope=message).get("content-type", "").startswith("text/event-stream")
            self._start = message
            if self._streamed:
                await self.send(message)
            return
        more = message.get("more_body", False)
        self._body += message.get("body", b"")
        if self._streamed:
            *events, self._body = self._body.split(b"\n\n")
            events += [self._body] if self._body and not more else []
            body = b"".join(self._event(event) for event in events)
            await self.send({"type": "http.response.body", "body": body, "more_body": more})
        elif not more and self._start is not None:
            body = self._whole(self._body)
            MutableHeaders(scope=self._start)["content-length"] = str(len(body))
            await self.send(self._start)
            await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _whole(self, body: bytes) -> bytes:
        answer = _object(body)
        for choice in _choices(answer):
            said = choice.get("message")
            if isinstance(said, dict) and isinstance(said.get("content"), str):
                text = AnswerText(self.stops)
                said["content"] = text.more(said["content"]) + text.end()
        return json.dumps(answer, ensure_ascii=False).encode() if _choices(answer) else body

    def _event(self, event: bytes) -> bytes:
        """Return an event of a stream; one whose text all waits for more is left out."""
        chunk = _object(event.removeprefix(b"data: "))
        choices = _choices(chunk)
        for choice in choices:
            delta = choice.setdefault("delta", {})
            text = self._texts.setdefault(choice.get("index", 0), AnswerText(self.stops))
            given = delta.pop("content", None)
            new = text.more(given) if given else ""
            if choice.get("finish_reason"):
                new += text.end()
            if new or given == "":
                delta["content"] = new
            elif given and not delta and not choice.get("finish_reason") and len(choices) == 1:
                return b""
        return (b"data: " + json.dumps(chunk, ensure_ascii=False).encode() if choices else event) + b"\n\n"


def _object(text: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _choices(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found = answer.get("choices")
    return [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []
