"""Stands in front of a server on this machine: other machines and other web pages are not answered."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
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
    port: int
    """Port of this server, which its own pages name as their origin."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_host(request)
            self._check_origin(request)
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

    def _check_origin(self, request: Request) -> None:
        """Refuse what a web page from elsewhere makes a browser send; programs send no Origin."""
        origins = [f"http://{host}:{self.port}" for host in (HOST, "localhost")]
        if request.headers.get("origin", origins[0]) not in origins:
            raise Refusal(403, "another web page may not ask here")


async def read_body(request: Request, most: int) -> bytes:
    """Return the body of a request; one that says it is larger than `most` bytes is not read at all.

    Raises:
        Refusal: it is too large, or the connection was closed.
    """
    too_large = Refusal(413, f"a request may have at most {most // 2**20} MiB")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and (len(said) > 15 or int(said) > most):
        raise too_large
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large
    except ClientDisconnect:
        raise Refusal(400, "the connection was closed") from None
    return bytes(body)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply; unlike starlette's JSONResponse it can hold a lone surrogate out of a request."""
    return Response(json.dumps(content), status, headers, "application/json")
