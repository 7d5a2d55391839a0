"""Stands in front of a server on this machine: other machines and other web pages are not answered."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dianjing.serve.server import HOST


class Refusal(Exception):
    """A request that is not let through, with its HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Guard(ABC):
    """An ASGI application in front of another one; each kind of guard says in `answer` what it lets through."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_host(request)
            await self.answer(request, send)
        except Refusal as refusal:
            await self.refusal(refusal)(scope, receive, send)

    @abstractmethod
    async def answer(self, request: Request, send: Send) -> None:
        """Answer a request that is meant for this machine.

        Raises:
            Refusal: it is not let through.
        """

    @abstractmethod
    def refusal(self, refusal: Refusal) -> Response:
        """Return what is sent instead of an answer."""

    def _check_host(self, request: Request) -> None:
        """Refuse a request that reached this machine under another name: that of some web page."""
        given = request.headers.get("host", "")
        host = given.rpartition(":")[0] or given
        if host not in (HOST, "localhost"):
            raise Refusal(403, f"this server answers only to {HOST} and localhost, not to the name {host!r}")


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply; unlike starlette's JSONResponse it can hold a lone surrogate out of a request."""
    return Response(json.dumps(content), status, headers, "application/json")
