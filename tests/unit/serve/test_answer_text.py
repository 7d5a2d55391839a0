"""The text of an answer, whole or streamed in any pieces, is what OpenAI's API would give."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest

from dianjing.serve.answer_text import AnswerText, Tidy


@pytest.mark.parametrize(
    ("said", "stops", "wanted"),
    [
        (" There are three", [], "There are three"),
        (" There are three", ["three"], "There are"),
        ("one two three", ["three", "two"], "one"),
        ("aab", ["ab"], "a"),
        ("abab", ["abc"], "abab"),
        ("ab", ["abc", "b"], "a"),
        ("three", ["three"], ""),
        ("红色的。三角形", ["。"], "红色的"),
        ("  \n two  lines \n\n", [], "two  lines"),
        ("", ["x"], ""),
    ],
)
def test_an_answer_ends_before_its_stop_text_however_it_is_cut(said: str, stops: list[str], wanted: str) -> None:
    for first in range(len(said) + 1):
        for second in range(first, len(said) + 1):
            text = AnswerText(stops)
            pieces = [said[a:b] for a, b in pairwise([0, first, second, len(said)])]
            got = [text.more(piece) for piece in pieces]
            assert "".join(got) + text.end() == wanted


def test_text_is_sent_as_soon_as_no_stop_text_can_begin_in_it() -> None:
    text = AnswerText(["three"])
    assert [text.more(piece) for piece in (" There", " are th", "ings")] == ["There", " are", " things"]


def tidied(parts: list[bytes], stops: list[str], kind: str) -> tuple[list[Any], bytes]:
    """Return the start message and the body that arrive."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def serve() -> None:
        tidy = Tidy(send=send, stops=stops)
        headers = [(b"content-type", kind.encode()), (b"content-length", b"1")]
        await tidy({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await tidy({"type": "http.response.body", "body": part, "more_body": True})
        await tidy({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(serve())
    return sent[0], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_whole_answer_keeps_its_other_fields() -> None:
    message = {"role": "assistant", "content": " a b 红 c"}
    answer = {"id": "1", "choices": [{"index": 0, "message": message}], "usage": {}}
    body = json.dumps(answer).encode()
    start, got = tidied([body[:20], body[20:]], ["红"], "application/json")
    message["content"] = "a b"
    assert json.loads(got) == answer
    assert dict(start["headers"])[b"content-length"] == str(len(got)).encode()


def test_an_error_stays_as_it_is() -> None:
    assert tidied([b'{"detail": "no"}'], ["n"], "application/json")[1] == b'{"detail": "no"}'
    assert tidied([b"not JSON"], ["n"], "text/plain")[1] == b"not JSON"


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"id": "1", "choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_is_cut_at_the_stop_text(size: int) -> None:
    events = [event(delta={"role": "assistant"})]
    events += [event(delta={"content": piece}) for piece in (" There", " are", " th", "ree", " left")]
    usage = b'data: {"id": "1", "choices": [], "usage": {"total_tokens": 3}}\n\n'
    stream = b"".join([*events, event(delta={}, finish_reason="stop"), usage, b"data: [DONE]\n\n"])
    parts = [stream[i : i + size] for i in range(0, len(stream), size)]
    _, got = tidied(parts, ["three"], "text/event-stream; charset=utf-8")
    assert got.endswith(usage + b"data: [DONE]\n\n")
    deltas = [json.loads(line[6:])["choices"][0] for line in got.decode().split("\n\n")[:-3]]
    assert deltas[0]["delta"] == {"role": "assistant"}
    assert deltas[-1]["finish_reason"] == "stop"
    assert [one["delta"]["content"] for one in deltas[1:-1]] == ["There", " are"]
