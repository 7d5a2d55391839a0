"""Put requests to the endpoint, many at once, each until it has an answer in the journal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dianjing.errors import DataError
from dianjing.make.cost import Budget
from dianjing.make.endpoint import CallError, Endpoint, Reply
from dianjing.make.filters import is_refusal
from dianjing.make.journal import Journal, Status
from dianjing.make.pictures import data_uri
from dianjing.make.rate_limiter import RateLimiter, full_jitter
from dianjing.make.replies import InvalidReply, read_pairs, read_strict, read_text
from dianjing.make.requests import RUNGS, Dialect, Parameters, Request, body

RETRIES = 5
"""More calls after one that failed for a reason that may pass."""
LIMITED_RETRIES = 20
"""More calls after one that came too fast (HTTP 429)."""
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 60.0
MOST_FAILURES = 10
"""Requests in a row without a usable reply after which a run ends: going on would only cost money."""
PROBES = 3
"""Requests tried before an endpoint that answers with errors alone counts as one that understands nothing."""
REASON_COMPARED = 40
"""First characters by which two reasons are the same."""
NOT_UNDERSTOOD = (400, 422, 500, 501)
"""HTTP statuses of an endpoint that may not understand how it was asked."""
NAMES_FORMAT = re.compile(r"response[_ ]?format|json[_ ]?(schema|object|mode)|structured|grammar|guided", re.IGNORECASE)
STREAM_ONLY = re.compile(r"\bstream", re.IGNORECASE)
NO_THOUGHTS = """turn thinking off, as the server allows it (--extra-body '{"enable_thinking": false}')"""


@dataclass(kw_only=True)
class Count:
    """How far a run is."""

    total: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    """Requests that wait before they are tried again."""


class Sender:
    """Sends the requests of one run, and keeps count."""

    def __init__(
        self,
        endpoint: Endpoint,
        journal: Journal,
        root: str,
        parameters: Parameters,
        budget: Budget,
        concurrency: int,
        show: Callable[[Sender, str], None],
    ) -> None:
        self.endpoint, self.journal, self.parameters, self.budget = endpoint, journal, parameters, budget
        self.limiter = RateLimiter(concurrency)
        self.count = Count()
        self.problems: dict[str, str] = {}
        """Key -> why a request could not be sent at all."""
        self.fatal = False
        """True if the run stopped for a fault that the user must correct."""
        self.dialect = Dialect()
        self._concurrency = concurrency
        self._failures_in_a_row = 0
        self.probing = False
        """True while the first requests show what the endpoint understands."""
        self.heard = False
        """True once the model answered: the key is right, then."""
        self.retried: set[str] = set()
        """Reasons for which calls were made again, each printed once."""
        self._show = show
        self._data_uri = lru_cache(maxsize=2 * concurrency)(lambda name: data_uri(root, name, *parameters.shown))

    def show(self, line: str = "") -> None:
        """Report that something changed, with a line to print or ""."""
        self._show(self, line)

    async def ask_all(self, requests: Sequence[Request]) -> None:
        """Settle every request that the journal has no answer to; `limiter.reason` says why some were left."""
        pending = list({request.key: request for request in requests if not self.settled(request)}.values())
        self.count = Count(total=len(pending))
        self.show()
        if pending:
            await find_dialect(self, pending)
        rest = iter(pending)

        async def work() -> None:
            for request in rest:
                if self.limiter.stopped.is_set():
                    return
                if not self.settled(request):
                    await self.settle(request)
                    self.note_done(request)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(pending))):
                group.create_task(work())

    def settled(self, request: Request) -> bool:
        """Return whether the journal has an answer to a request, or the last of its failures."""
        return self.journal.entry(request.key).settled

    async def settle(self, request: Request) -> CallError | None:
        """Ask until the request is settled; return the error on which it was given up."""
        tries = limited = 0
        while not self.settled(request) and not self.limiter.stopped.is_set():
            error = await self._call(request)
            if error is None:
                continue
            if error.status == 403 and self.heard:  # about this picture, whatever it says
                return error
            if error.fatal:
                self.fatal = True
                self.limiter.stop(f"{error.fatal} ({error})")
            elif error.status == 429 and limited < LIMITED_RETRIES:
                limited += 1
                _pause(self, error)
            elif not error.retry or tries == RETRIES or error.status == 429:
                return error
            else:
                tries += 1
                wait = full_jitter(RETRY_SECONDS, tries, LONGEST_RETRY_SECONDS)
                _say_once(self, error)
                await _wait(self, max(wait, min(error.wait_seconds or 0.0, LONGEST_RETRY_SECONDS)))
        return None

    async def _call(self, request: Request) -> CallError | None:
        """Make one call and write what came of it to the journal before anything else."""
        try:
            image = await asyncio.to_thread(self._data_uri, request.picture.name) if request.picture else None
        except DataError as error:
            self.problems[request.key] = str(error)
            return CallError(str(error))
        entry = self.journal.entry(request.key)
        message = body(request, image, self.parameters, self.dialect, entry.invalid[-1] if entry.invalid else None)
        if not await self.limiter.enter():
            return None
        try:
            if not await self._affordable(request):
                return None
            about = {"image": request.picture.name if request.picture else None, "prompt": request.prompt}
            self.journal.sent(request.key, {**about, "index": request.index})
            try:
                reply = await self.endpoint.ask(message)
            except CallError as error:
                status: Status = "refused" if error.refused else "failed"
                self.journal.received(request.key, status, {"prompt": request.prompt, "reason": str(error)})
                return None if error.refused else error
            return self._receive(request, reply)
        finally:
            self.limiter.leave()

    async def _affordable(self, request: Request) -> bool:
        """Return whether the budget allows one more call, waiting for those under way to show their true cost."""
        while reason := self.budget.refuses(request):
            if self.limiter.under_way == 1:  # this one
                self.limiter.stop(f"{reason}; raise the limit and run the same command to go on")
                return False
            self.limiter.under_way -= 1
            await self.limiter.change()
            self.limiter.under_way += 1
            if self.limiter.stopped.is_set():
                return False
        return True

    def _receive(self, request: Request, reply: Reply) -> CallError | None:
        """Write a reply to the journal, and learn whether the endpoint minds how JSON is asked for."""
        status, fields = judged(request, reply, self.budget.cost(request, reply.usage), self.parameters.max_tokens)
        self.journal.received(request.key, status, fields)
        self.limiter.answered()
        self.heard = True
        if status == "failed":  # the same again would bring the same
            return CallError(fields["reason"], status=200)
        if self.probing and request.reply == "pairs" and ignores_response_format(reply):
            self.dialect = replace(self.dialect, rung="text")
        return None

    def note_done(self, request: Request) -> None:
        """Count a request that was tried; stop the run after too many failures in a row."""
        entry = self.journal.entry(request.key)
        ok = entry.status in ("ok", "refused")
        given_up = not ok and not self.limiter.stopped.is_set()
        self.count.done += ok
        self.count.failed += given_up
        self._failures_in_a_row = self._failures_in_a_row + 1 if given_up else 0
        if self._failures_in_a_row >= MOST_FAILURES:
            hint = "; a model that writes no JSON can be asked with --questions" if entry.status == "invalid" else ""
            reason = self.problems.get(request.key, entry.reason)
            self.limiter.stop(f"{MOST_FAILURES} requests in a row brought nothing usable, the last one: {reason}{hint}")
        self.show()


def _say_once(sender: Sender, error: CallError) -> None:
    """Print a reason for which calls are made again, the first time that it comes."""
    kind = str(error)[:REASON_COMPARED]
    if kind not in sender.retried:
        sender.retried.add(kind)
        sender.show(f"{error}; such calls are tried again, {RETRIES} times at most")


def _pause(sender: Sender, error: CallError) -> None:
    before = sender.limiter.pause_seconds
    after = sender.limiter.pause(error.wait_seconds)
    if after > before + 0.5:
        sender.show(f"waiting {after:.0f} s, then {sender.limiter.limit} at once: {error}")


async def _wait(sender: Sender, seconds: float) -> None:
    sender.count.waiting += 1
    sender.show()
    await sender.limiter.sleep(seconds)
    sender.count.waiting -= 1


async def find_dialect(sender: Sender, pending: Sequence[Request]) -> None:
    """Learn from the first requests what the endpoint understands, and show it."""
    structured = [request for request in pending if request.reply == "pairs"]
    error: CallError | None = None
    sender.probing = True
    for rung in RUNGS if structured else ("text",):
        sender.dialect = replace(sender.dialect, rung=rung)
        error = await _probe(sender, structured or pending)
        if error is None or error.status not in NOT_UNDERSTOOD or sender.limiter.stopped.is_set():
            break
    sender.probing = False
    if error and not sender.limiter.reason:
        sender.fatal = True
        sender.limiter.stop(f"the endpoint accepts no request: {error}")
    if not sender.limiter.stopped.is_set():
        sender.show(f"replies are asked for as: {sender.dialect.rung}")


async def _probe(sender: Sender, requests: Sequence[Request]) -> CallError | None:
    """Settle requests until the model answers one; return the error that is about all of them, not about a picture.

    Such an error names the way in which JSON is asked for, or comes for several pictures.
    """
    error: CallError | None = None
    errors = 0
    for request in requests:
        if sender.limiter.stopped.is_set() or errors == PROBES:
            return error
        if sender.settled(request):
            continue
        error = await sender.settle(request)
        while error and (dialect := _other_words(sender.dialect, error)):
            sender.dialect = dialect
            error = await sender.settle(request)
        if sender.settled(request):
            sender.note_done(request)
        if error is None and sender.heard:
            return None
        errors += error is not None
        if error and (error.status not in (*NOT_UNDERSTOOD, 200) or NAMES_FORMAT.search(str(error))):
            return error
    return error


def _other_words(dialect: Dialect, error: CallError) -> Dialect | None:
    """Return what an error asks for instead; None if it does not say, or it was done already."""
    said = str(error)
    if error.status not in NOT_UNDERSTOOD:
        return None
    if "max_completion_tokens" in said and dialect.token_limit == "max_tokens":
        return replace(dialect, token_limit="max_completion_tokens")
    return replace(dialect, stream=True) if STREAM_ONLY.search(said) and not dialect.stream else None


def judged(request: Request, reply: Reply, cost: float | None, max_tokens: int) -> tuple[Status, dict[str, Any]]:
    """Return what a reply is worth, and the journal's fields for it."""
    # Some servers put JSON into the field of the thoughts; a caption there looks like any thought.
    in_thoughts = request.reply == "pairs" and not reply.text.strip() and reply.finish_reason != "length"
    text = reply.reasoning if in_thoughts else reply.text
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "reply": text,
        "finish_reason": reply.finish_reason,
        "usage": reply.usage,
        "cost": cost,
        "model": reply.model,
    }
    if reply.refusal or reply.finish_reason == "content_filter":
        return "refused", {**fields, "reason": reply.refusal or "the endpoint's content filter"}
    if not reply.text.strip() and reply.finish_reason == "length":
        reason = f"the model's thoughts took all of --max-tokens ({max_tokens}); give it more, or {NO_THOUGHTS}"
        return "failed", {**fields, "reason": reason}
    if not text.strip() and reply.reasoning:
        return "failed", {**fields, "reason": f"the endpoint takes the whole reply for a thought; {NO_THOUGHTS}"}
    try:
        if request.reply == "pairs":
            read_pairs(text)
        else:
            read_text(text)
            if reply.finish_reason == "length":
                raise InvalidReply("the reply was cut off for its length; write less")
    except InvalidReply as error:
        if is_refusal(text):
            return "refused", {**fields, "reason": "the model refuses"}
        return "invalid", {**fields, "reason": str(error)}
    return "ok", fields


def ignores_response_format(reply: Reply) -> bool:
    """Return whether a complete reply is not plain JSON, although the endpoint was asked for nothing else."""
    said = reply.text.strip()
    if not said or reply.refusal or reply.finish_reason in ("length", "content_filter") or is_refusal(said):
        return False
    try:
        read_strict(reply.text)
    except InvalidReply:
        return True
    return False
