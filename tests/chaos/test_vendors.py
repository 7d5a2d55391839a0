"""`dianjing make` against endpoints that behave as vendors' do: a fault about one picture costs that picture alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.conftest import Maker
from tests.chaos.endpoint import Endpoint, Hit


def streamed(hit: Hit) -> str:
    return "streamed" if hit.body.get("stream") else "stream_only"


@pytest.mark.parametrize("fault", ["moderated_403", "moderated_400", "inspected"])
@pytest.mark.parametrize("orders", [{0}, {1}, {0, 1, 2}], ids=["first", "second", "first three"])
def test_a_moderated_picture_costs_that_picture(
    make: Maker, fault: str, orders: set[int], capsys: pytest.CaptureFixture[str]
) -> None:
    names = make.pictures(6)
    with Endpoint(lambda hit: fault if hit.order in orders else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 0
        assert len(endpoint.hits) == 6
    assert [record["image"] for record in make.records] == [names[i] for i in range(6) if i not in orders]
    assert make.report["dropped"] == {"refusal": len(orders)}
    assert {hit.response_format for hit in endpoint.hits} == {"json_schema"}
    assert "replies are asked for as: json_schema" in capsys.readouterr().err


def test_403_after_an_answer_is_about_the_picture(make: Maker) -> None:
    names = make.pictures(4)
    with Endpoint(lambda hit: "error_403" if hit.order == 1 else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 1
    assert [record["image"] for record in make.records] == [names[0], *names[2:]]
    assert make.report["failed"][0]["reason"] == "HTTP 403: not for you"


def test_403_from_the_first_on_is_about_the_key(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(4)
    with Endpoint(lambda hit: "error_403") as endpoint:
        assert make(endpoint) == 2
        assert len(endpoint.hits) == 1
    assert "refuses the key" in capsys.readouterr().err


def test_an_error_inside_a_reply_is_tried_again_and_said(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "choice_error" if hit.order == 0 else "") as endpoint:
        assert make(endpoint) == 0
    assert {hit.response_format for hit in endpoint.hits} == {"json_schema"}
    assert make.statuses() == ["failed", "ok", "ok", "ok"]
    said = capsys.readouterr().err
    assert "an error for a reply: upstream is gone; such calls are tried again, 5 times at most" in said


@pytest.mark.parametrize(
    ("fault", "message", "calls"),
    [
        ("no_money", "has nothing left to spend (HTTP 429: Your account is suspended)", 1),
        ("web_page", "answers with a web page; is /v1 missing in --base-url?", 1),
        ("all_thought", "thoughts took all of --max-tokens (1024); give it more, or turn thinking off", 3),
    ],
)
def test_what_would_only_cost_more_is_said_at_once(
    make: Maker, fault: str, message: str, calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(5)
    with Endpoint(lambda hit: fault) as endpoint:
        assert make(endpoint, "--concurrency", "1") == 2
        assert len(endpoint.hits) == calls
    assert message in capsys.readouterr().err


def test_a_picture_with_too_long_a_thought_is_paid_for_once(make: Maker) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "all_thought" if hit.order == 1 else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 1
        assert len(endpoint.hits) == 3
    assert {hit.response_format for hit in endpoint.hits} == {"json_schema"}
    assert len(make.records) == 2


@pytest.mark.parametrize("fault", ["in_thoughts", "more_keys"])
def test_pairs_are_taken_where_they_can_be_meant(make: Maker, fault: str) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: fault) as endpoint:
        assert make(endpoint) == 0
        assert len(endpoint.hits) == 3
    assert len(make.records) == 3


def test_a_thought_without_its_opening_is_cut_off(make: Maker) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "open_thought") as endpoint:
        assert make(endpoint, "--prompts", "caption") == 0
    assert len(make.records) == 3
    assert all(one["conversations"][1]["value"].startswith("There is a thing") for one in make.records)


def test_an_endpoint_that_only_streams_is_asked_so(make: Maker) -> None:
    make.pictures(3)
    with Endpoint(streamed) as endpoint:
        assert make(endpoint) == 0
        assert [bool(hit.body.get("stream")) for hit in endpoint.hits] == [False, True, True, True]
    assert len(make.records) == 3
    assert make.journal[-1]["usage"] == {"prompt_tokens": 100, "completion_tokens": 20}


def test_a_stream_that_nobody_asked_for_is_read(make: Maker) -> None:
    make.pictures(2)
    with Endpoint(lambda hit: "streamed") as endpoint:
        assert make(endpoint) == 0
        assert len(endpoint.hits) == 2


def test_the_wait_that_gemini_asks_for(make: Maker) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "gemini_limited" if hit.order == 1 else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 0
    assert endpoint.times[2] - endpoint.times[1] > 0.35


def test_fields_of_a_vendor_are_sent_with_every_message(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(2)
    with Endpoint() as endpoint:
        assert make(endpoint, "--extra-body", '{"enable_thinking": false, "top_k": 3}') == 0
    assert [(hit.body["enable_thinking"], hit.body["top_k"]) for hit in endpoint.hits] == [(False, 3)] * 2
    for wrong, message in (
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"model": "x"}', "model is given"),
    ):
        assert make(None, "--extra-body", wrong, "--dry-run") == 2
        assert message in capsys.readouterr().err


def test_a_batch_keeps_the_vendors_reason(make: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(3)
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    make(None, "--batch-out", str(requests))
    keys = [json.loads(line)["custom_id"] for line in requests.read_text().splitlines()]
    errors = [{"message": "too many pixels"}, {"message": "filtered", "code": "content_filter"}]
    rows = [
        {"custom_id": key, "response": {"status_code": 400, "body": {"error": error}}, "error": None}
        for key, error in zip(keys, errors, strict=False)
    ]
    results.write_text("\n".join(map(json.dumps, rows)))
    assert make(None, "--batch-in", str(results)) == 1
    assert "1 failed, 1 refused" in capsys.readouterr().out
    assert "batch: HTTP 400: too many pixels" in [line.get("reason") for line in make.journal]
    assert make(None, "--batch-in", str(requests)) == 2
    assert "the requests that --batch-out wrote" in capsys.readouterr().err
