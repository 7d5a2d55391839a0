"""Requests as files of OpenAI's Batch API, whose results go into the journal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dianjing.errors import DataError
from dianjing.make.cost import Budget
from dianjing.make.endpoint import error_text, read_reply
from dianjing.make.journal import Journal
from dianjing.make.pictures import data_uri
from dianjing.make.requests import Dialect, Parameters, Request, body
from dianjing.make.send import judged

FILE_BYTES = 190_000_000
FILE_REQUESTS = 50_000
"""Most that the API takes in one file, with some room."""
PATH = "/v1/chat/completions"


def write_batch(
    path: Path, requests: Sequence[Request], journal: Journal, root: str, parameters: Parameters, dialect: Dialect
) -> list[Path]:
    """Write the requests that the journal has no answer to, over as many files as the API needs; return those.

    Raises:
        DataError: a file exists, or a picture can no longer be opened.
    """
    pending = {one.key: one for one in requests if not journal.entry(one.key).settled}
    written: list[Path] = []
    file, size, number = None, 0, 0
    try:
        for key, request in pending.items():
            entry = journal.entry(key)
            picture = request.picture
            image = data_uri(root, picture.name, *parameters.shown) if picture else None
            message = body(request, image, parameters, dialect, entry.invalid[-1] if entry.invalid else None)
            line = json.dumps({"custom_id": key, "method": "POST", "url": PATH, "body": message}) + "\n"
            if file is None or size + len(line) > FILE_BYTES or number == FILE_REQUESTS:
                if file:
                    file.close()
                written.append(path if not written else path.with_name(f"{path.stem}_{len(written) + 1}{path.suffix}"))
                if written[-1].exists():
                    raise DataError(f"{written[-1]}: it already exists; remove it, or name another file (--batch-out)")
                file, size, number = open(written[-1], "w", encoding="utf-8"), 0, 0  # noqa: SIM115
            file.write(line)
            size, number = size + len(line), number + 1
    finally:
        if file:
            file.close()
    return written


def read_batch(
    path: Path, requests: Sequence[Request], journal: Journal, budget: Budget, without_key: Callable[[str], str]
) -> Counter[str]:
    """Write the results that a batch brought to the journal, and return how many there were of each kind.

    A result that the journal already has is not counted again; one of another plan is left out.

    Raises:
        DataError: the file cannot be read or is not a batch result.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason}); give the result file of a batch") from None
    planned = {request.key: request for request in requests}
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        try:
            result: Any = json.loads(without_key(line))
            if "method" in result and "response" not in result:
                raise DataError(f"{path}: the requests that --batch-out wrote; give the results that the API returned")
            if not {"response", "error"} & result.keys():
                raise DataError(
                    f"{path}: line {number} is not a batch result (no response); give the file the API returned"
                )
            key, response, error = result["custom_id"], result.get("response") or {}, result.get("error")
            status = int(response.get("status_code", 0))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise DataError(f"{path}: line {number} is not a batch result; give the file the API returned") from None
        if key not in planned:
            counts["of another plan"] += 1
        else:
            counts[_take(planned[key], response, error, status, journal, budget)] += 1
    return counts


def _take(
    request: Request, response: dict[str, Any], error: object, status: int, journal: Journal, budget: Budget
) -> str:
    entry = journal.entry(request.key)
    if entry.settled:
        return "already in the journal"
    body: Any = response.get("body")
    refused = False
    try:
        if status != 200:
            said, refused = error_text(status, body or error)
            raise ValueError(said if status else f"no response: {error}")
        reply = read_reply(json.loads(body) if isinstance(body, str) else body)
    except ValueError as problem:
        fields = {"prompt": request.prompt, "reason": f"batch: {str(problem)[:300]}", "batch": True}
        journal.received(request.key, "refused" if refused else "failed", fields)
        return "refused" if refused else "failed"
    if reply.text in [text for text, _ in entry.invalid]:
        return "already in the journal"
    outcome, fields = judged(request, reply, budget.cost(request, reply.usage), budget.parameters.max_tokens)
    journal.received(request.key, outcome, {**fields, "batch": True})
    return outcome
