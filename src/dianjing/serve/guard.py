"""Stands before the page: only this machine, only who has the address from the terminal, and no other web page."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass

from dianjing.serve.serve import HOST, App, Message, Receive, Refusal, Send, check_sender

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer: nothing is loaded from elsewhere, and nothing that a text says is run."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Lets through what the page itself asks; the token in the path is known to who can read the terminal."""

    app: App
    port: int
    token: str

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on without the token."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            path = self._checked(headers, scope["path"])
        except Refusal as refusal:
            await _refuse(send, refusal)
            return

        begun = False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send_safely)
        except asyncio.CancelledError:  # Ctrl-C, and the answer took too long to be waited for
            if not begun:
                await _refuse(send, Refusal(503, "the studio was ended"))

    def _checked(self, headers: Mapping[str, str], path: str) -> str:
        """Return the path without its token.

        Raises:
            Refusal: another page or another machine asks, or the token is not there.
        """
        check_sender(headers, "")
        origins = [f"http://{host}:{self.port}" for host in (HOST, "localhost")]
        if headers.get("origin", origins[0]) not in origins:
            raise Refusal(403, "another web page may not ask here")
        token, slash, rest = path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.token.encode()):
            raise Refusal(404, "open the address that the terminal shows")
        return f"/{rest}"


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"error": str(refusal)}).encode()
    headers = {**HEADERS, "content-type": "application/json", "content-length": str(len(body))}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
