"""One call to an OpenAI-compatible endpoint: a reply, or an error that says whether to try again."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast
from urllib.parse import urlsplit

from dianjing.errors import ConfigError

KEY_VARIABLES = ("DIANJING_API_KEY", "OPENAI_API_KEY")
NO_KEY = "none"
"""The key for a server that asks for none."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
SECRET_CHARACTERS = 8
SHOWN_CHARACTERS = 300
"""Of what an endpoint says about an error."""
MODERATED_STATUSES = (200, 400, 403, 422, 451)
MODERATED = re.compile(
    r"content[_ ]?(filter|policy|management|moderation|safety)|data_?inspection|\bmoderation\b|flagged_input"
    r"|\bflagged\b|responsible_?ai|inappropriate content|prohibited_content"
    r"|safety system|sensitive content|内容安全|敏感|违规",
    re.IGNORECASE,
)
"""In an error about what is in one picture, as vendors word it."""
NO_MONEY_CODES = re.compile(
    r"insufficient_(quota|balance|funds|credits?)|exceeded_current_quota|arrearage|billing_hard_limit", re.I
)
NO_MONEY = re.compile(r"insufficient (balance|funds|credits?)|credit balance is too low|余额不足|欠费", re.IGNORECASE)
"""Codes and words of an account with nothing left; Gemini says "quota" and "billing" of a rate limit too."""
RETRY_DELAY = re.compile(r'"retryDelay":\s*"([\d.]+)s"')
REASONING = ("reasoning_content", "reasoning")
STREAM = re.compile(r"\s*(data:|event:|id:|retry:|: )")
"""Begins server-sent events."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer of an endpoint."""

    text: str
    finish_reason: str
    refusal: str
    usage: dict[str, int] | None
    """prompt_tokens and completion_tokens, if the endpoint counts them."""
    model: str
    """The model that it names."""
    reasoning: str = ""
    """The thoughts, where the endpoint puts them into a field of their own."""


class ErrorInside(ValueError):
    """An error in the place of a reply; the text is what the endpoint says."""


class CallError(Exception):
    """A call that brought no reply; the text is the reason, without the key."""

    def __init__(
        self,
        reason: str,
        *,
        status: int = 0,
        retry: bool = False,
        wait_seconds: float | None = None,
        fatal: str = "",
        refused: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status = status
        """The HTTP status; 0 if there was no answer, or none that can be read."""
        self.retry = retry
        self.wait_seconds = wait_seconds
        """How long the endpoint asks to wait; None if it does not say."""
        self.fatal = fatal
        """The fault that the user must correct before any other call can succeed."""
        self.refused = refused
        """The endpoint does not answer about this picture; it says nothing about others."""


def api_key() -> str:
    """Return the key that the environment holds, or "" if it holds none."""
    return next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), "")


def without_key(text: str) -> str:
    """Return the text with the key blotted out: an endpoint may repeat it.

    A short one ("EMPTY", as some local servers want) is not a secret, but may be a word of an answer.
    """
    key = api_key()
    return text.replace(key, "***") if len(key) >= SECRET_CHARACTERS else text


def check_base_url(base_url: str) -> str:
    """Return a warning about an endpoint's address, "" if there is nothing to say.

    Raises:
        ConfigError: it is not an http(s) address, or holds a password.
    """
    try:
        parts = urlsplit(base_url)
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(f'--base-url "{base_url}": not an address; write one such as http://127.0.0.1:8000/v1')
    if parts.username or parts.password or parts.query or parts.fragment:
        # Not repeated: it may be a key.
        raise ConfigError(
            f"--base-url of {host}: it holds a user name, a password or a query; write it without, and put the key "
            f"into the environment ({' or '.join(KEY_VARIABLES)})"
        )
    if parts.scheme == "http" and host not in LOCAL_HOSTS:
        sent = "the key and the pictures go" if api_key() else "the pictures go"
        return f"{base_url}: http:// to another machine: {sent} over the network in clear; use https:// if it has it"
    return ""


class Endpoint:
    """A client of one endpoint; opened and closed with `async with`."""

    def __init__(self, base_url: str, timeout_seconds: float) -> None:
        import openai  # the extra "make"; slow

        self.base_url = base_url
        self.timeout_seconds = timeout_seconds
        # No redirects: they could lead the key elsewhere. No retries: the SDK's would be neither seen nor journaled.
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key() or NO_KEY,
            max_retries=0,
            timeout=timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def __aenter__(self) -> Endpoint:
        """Return the endpoint itself."""
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Make one call, which takes no longer than the timeout in all.

        Raises:
            CallError: there is no reply.
        """
        import openai

        try:
            async with asyncio.timeout(self.timeout_seconds):
                content = await self._content(body)
        except (TimeoutError, openai.APITimeoutError):
            raise CallError(f"timeout: no whole reply in {self.timeout_seconds:g} s", retry=True) from None
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.APIConnectionError as error:
            kind = type(error.__cause__).__name__
            shown = _printable(without_key(str(error.__cause__ or error)))[:SHOWN_CHARACTERS] or kind
            # A call that never left cannot have been paid for; one that was cut off can.
            what = "no connection" if kind == "ConnectError" else "connection"
            raise CallError(f"{what}: {shown}", retry=True) from None
        return self._read(content)

    async def _content(self, body: Mapping[str, Any]) -> str:
        named = {name: body[name] for name in ("model", "messages", "stream") if name in body}
        others = {name: value for name, value in body.items() if name not in named}
        raw = await self._client.chat.completions.with_raw_response.create(**named, extra_body=others)
        if "stream" in named:
            await raw.http_response.aread()
        return raw.http_response.text

    def _read(self, content: str) -> Reply:
        shown = _printable(without_key(content))[:SHOWN_CHARACTERS]
        if re.match(r"\s*<(!doctype|html|\?xml)", content, re.IGNORECASE):
            raise CallError(
                shown, status=200, fatal=f"{self.base_url} answers with a web page; is /v1 missing in --base-url?"
            )
        try:
            reply = read_reply(read_stream(content) if STREAM.match(content) else json.loads(content))
        except ErrorInside as error:
            said, code = _said(str(error))
            raise self._error_of(200, said, code, str(error), retry=True) from None
        except (ValueError, RecursionError) as error:
            what = _printable(without_key(str(error)))
            raise CallError(f"not a chat completion ({what}): {shown}", retry=True) from None
        text, refusal, model, reasoning = map(without_key, (reply.text, reply.refusal, reply.model, reply.reasoning))
        return replace(reply, text=text, refusal=refusal, model=model, reasoning=reasoning)

    def _status_error(self, error: Any) -> CallError:
        status: int = error.status_code
        content: str = error.response.text
        said, code = _said(content)
        # llama-server's way to say that the reply was cut off inside its grammar.
        cut = status == 500 and "peg-native" in said
        wait = retry_after(error.response.headers)
        if wait is None and (asked := RETRY_DELAY.search(content)):  # Gemini
            wait = float(asked[1])
        return self._error_of(status, said, code, content, retry=status in RETRIED and not cut, wait_seconds=wait)

    def _error_of(
        self, status: int, said: str, code: str, content: str, *, retry: bool, wait_seconds: float | None = None
    ) -> CallError:
        """Return what an endpoint says as an error that knows what is to be done."""
        where = f"HTTP {status}" if status != 200 else "an error for a reply"
        reason = f"{where}: {_printable(without_key(said))[:SHOWN_CHARACTERS]}"
        if status in MODERATED_STATUSES and MODERATED.search(content):
            return CallError(reason, status=status, refused=True)
        fatal = {
            401: f"refuses the key; put the right one in {' or '.join(KEY_VARIABLES)}",
            402: "has nothing left to spend",
            403: f"refuses the key; put the right one in {' or '.join(KEY_VARIABLES)}",
            404: "has no such model, or the path is wrong; see --model and --base-url",
        }.get(status, "")
        if NO_MONEY_CODES.search(code) or NO_MONEY.search(said):
            fatal = "has nothing left to spend"
        if 300 <= status < 400:
            fatal = "sends calls elsewhere; give the address it names as --base-url"
        if fatal:
            return CallError(reason, status=status, fatal=f"{self.base_url} {fatal}")
        return CallError(reason, status=status, retry=retry, wait_seconds=wait_seconds)


def _printable(text: str) -> str:
    """Return what an endpoint says without marks that a terminal would obey."""
    return "".join(character if character.isprintable() else " " for character in text)


def _said(content: str) -> tuple[str, str]:
    """Return the message of an error's body, and its code and type."""
    try:
        value: Any = json.loads(content)
        value = value[0] if isinstance(value, list) else value  # Gemini
        inner = value.get("error", value)
        if isinstance(inner, dict):
            code = f"{inner.get('code') or ''} {inner.get('type') or ''}"
            return str(inner.get("message") or inner.get("detail") or content), code
        return str(inner), ""
    except (ValueError, AttributeError, IndexError, RecursionError):
        return content.strip(), ""


def error_text(status: int, body: object) -> tuple[str, bool]:
    """Return what the result of a batch says about a request that failed, and if it refuses the picture."""
    content = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    said = _printable(_said(content)[0])[:SHOWN_CHARACTERS]
    return f"HTTP {status}: {said}", status in MODERATED_STATUSES and bool(MODERATED.search(content))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds an answer's headers ask to wait; None if they do not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, IndexError):
                continue
        if seconds == seconds:  # not NaN
            return max(0.0, seconds)
    return None


def read_reply(value: object) -> Reply:
    """Return the reply that a chat completion holds.

    Raises:
        ErrorInside: it is an error of the endpoint.
        ValueError: it is not a chat completion.
    """
    top = _mapping(value, "the body")
    choices = top.get("choices")
    if not isinstance(choices, list) or not choices:
        if top.get("error"):
            raise ErrorInside(json.dumps(top["error"], ensure_ascii=False))
        raise ValueError("there are no choices")
    choice = _mapping(choices[0], "the choice")
    if choice.get("error") or choice.get("finish_reason") == "error":
        raise ErrorInside(json.dumps(choice.get("error") or "it gives no reason", ensure_ascii=False))
    message = _mapping(choice.get("message"), "the message")
    text, refusal = message.get("content"), message.get("refusal")
    if isinstance(text, list):
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
    return Reply(
        text=text if isinstance(text, str) else "",
        finish_reason=str(choice.get("finish_reason") or "")[:40],
        refusal=refusal if isinstance(refusal, str) else "",
        usage=_usage(top.get("usage")),
        model=str(top.get("model") or ""),
        reasoning=next((str(message[name]) for name in REASONING if isinstance(message.get(name), str)), ""),
    )


def read_stream(content: str) -> dict[str, Any]:
    """Return the chat completion that came in pieces, as server-sent events.

    Raises:
        ValueError: a piece is not a JSON object.
    """
    joined: dict[str, Any] = {}
    message: dict[str, str] = {}
    choice: dict[str, Any] = {"message": message}
    for line in content.splitlines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = _mapping(json.loads(data), "a piece of the stream")
        joined |= {name: chunk[name] for name in ("model", "usage", "error") if chunk.get(name)}
        for part in chunk.get("choices") or []:
            piece = _mapping(part, "the choice")
            choice |= {name: piece[name] for name in ("finish_reason", "error") if piece.get(name)}
            for name in ("content", "refusal", *REASONING):
                text = (piece.get("delta") or {}).get(name)
                if isinstance(text, str):
                    message[name] = message.get(name, "") + text
            joined["choices"] = [choice]
    return joined


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return cast(dict[str, Any], value)


def _usage(value: object) -> dict[str, int] | None:
    if not isinstance(value, dict):
        return None
    found = {name: cast(dict[str, object], value).get(name) for name in ("prompt_tokens", "completion_tokens")}
    if not all(isinstance(number, int) and number >= 0 for number in found.values()):
        return None
    return cast(dict[str, int], found)
