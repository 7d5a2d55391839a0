"""The guard of the studio's page: only who has the address from the terminal gets in, and no other web page."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Send

from dianjing.serve.guard import Guard, Refusal, as_json

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer without headers of its own: nothing is loaded from elsewhere, nothing that a text says is run."""
REPORT = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
}
"""Of a page that lies in a file: it is shown in a frame of its own origin, which reaches no address at all."""


@dataclass(frozen=True, kw_only=True)
class PageGuard(Guard):
    """Lets through what the page itself asks; the token in the path is known to who can read the terminal."""

    token: str

    async def answer(self, request: Request, send: Send) -> None:
        """Pass a request on without the token in its path."""
        path, begun = self._without_token(request), False

        async def send_safely(message: Message) -> None:
            nonlocal begun
            begun = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            scope = {**request.scope, "path": path, "raw_path": path.encode()}
            await self.app(scope, request.receive, send_safely)
        except asyncio.CancelledError:  # Ctrl-C, and the answer took too long to be waited for
            if not begun:
                raise Refusal(503, "the studio was ended") from None

    def refusal(self, refusal: Refusal) -> Response:
        """Return an error as the page reads it."""
        return as_json({"error": str(refusal)}, refusal.status, HEADERS)

    def _without_token(self, request: Request) -> str:
        """Return the path without its token.

        Raises:
            Refusal: the token is not there.
        """
        token, slash, rest = request.scope["path"].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.token.encode()):
            raise Refusal(404, "open the address that the terminal shows")
        return f"/{rest}"
