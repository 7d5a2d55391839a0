"""The guard of the chat API.

`transformers serve` reads any local path that stands where a picture's address should, follows HTTP redirects, and
loads whatever model a request names. Only chat requests for the one model pass, with the pictures inside the request.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

from dianjing.serve.answer_text import Tidy
from dianjing.serve.chat_request import ContextWindow, safe_request, stop_texts
from dianjing.serve.guard import Guard, Refusal, as_json, read_body

MAX_REQUEST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ApiGuard(Guard):
    """Lets only safe requests for one model through."""

    model: str
    window: ContextWindow
    key: str = ""
    """Bearer token that every request must bring; "" = none."""

    async def answer(self, request: Request, send: Send) -> None:
        """Answer a request, or pass it on."""
        given, key = request.headers.get("authorization", ""), f"Bearer {self.key}"
        if self.key and not hmac.compare_digest(given.encode(), key.encode()):
            raise Refusal(401, "the key is missing or wrong; send it as Authorization: Bearer KEY")
        match request.method, request.scope["path"]:
            case "GET", "/v1/models":
                models = {"object": "list", "data": [{"id": self.model, "object": "model"}]}
                await as_json(models)(request.scope, request.receive, send)
            case "GET", "/health":
                await self.app(request.scope, request.receive, send)
            case "POST", "/v1/chat/completions":
                await self._pass_on(request, safe_request(await _read(request), self.model, self.window), send)
            case _:
                raise Refusal(404, "only POST /v1/chat/completions, GET /v1/models and GET /health are served")

    def refusal(self, refusal: Refusal) -> Response:
        """Return an error as OpenAI's API writes it."""
        return as_json({"error": {"message": str(refusal), "type": "invalid_request_error"}}, refusal.status)

    async def _pass_on(self, request: Request, body: bytes, send: Send) -> None:
        headers = MutableHeaders(raw=[*request.scope["headers"]])
        headers["content-length"] = str(len(body))
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return parts.pop() if parts else await request.receive()

        tidy = Tidy(send=send, stops=stop_texts(body))
        await self.app({**request.scope, "headers": headers.raw}, replay, tidy)


async def _read(request: Request) -> bytes:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send the request as application/json")
    return await read_body(request, MAX_REQUEST_BYTES)
