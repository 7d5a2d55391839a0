"""`dianjing make` against an endpoint that does everything wrong that endpoints do."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest

from dianjing.make import send
from tests.chaos.conftest import Maker
from tests.chaos.endpoint import Behaviour, Endpoint, Hit

KEY = "sk-very-secret-0123456789"


def once(fault: str) -> Behaviour:
    """Return the behaviour that answers the first call about each picture with a fault, all others well."""
    return lambda hit: "" if hit.number or hit.again else fault


def always(fault: str, number: int = 10**9) -> Callable[[Hit], str]:
    """Return the behaviour that gives the fault to the first `number` calls."""
    calls = itertools.count()
    return lambda hit: fault if next(calls) < number else ""


@pytest.mark.parametrize("fault", ["error_500", "drop", "half_body", "not_json", "no_choices"])
def test_what_passes_is_tried_again(make: Maker, fault: str) -> None:
    names = make.pictures(4)
    with Endpoint(once(fault)) as endpoint:
        assert make(endpoint) == 0
    assert [record["image"] for record in make.records] == names
    assert sorted(make.statuses()) == ["failed"] * 4 + ["ok"] * 4
    assert set(endpoint.served.values()) == {1}


@pytest.mark.parametrize("fault", ["wrong_schema", "cut_text"])
def test_a_reply_that_cannot_be_used_is_asked_for_once_more(make: Maker, fault: str) -> None:
    make.pictures(3)
    prompts = ["--prompts", "caption"] if fault == "cut_text" else []
    with Endpoint(once(fault)) as endpoint:
        assert make(endpoint, *prompts) == 0
    assert sorted(make.statuses()) == ["invalid"] * 3 + ["ok"] * 3
    again = [hit for hit in endpoint.hits if hit.again]
    assert len(again) == 3
    fault_named = again[0].body["messages"][2]["content"]
    assert "pairs[0] must be" in fault_named or "cut off" in fault_named


def test_a_second_such_reply_is_the_end_of_it(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "wrong_schema") as endpoint:
        assert make(endpoint) == 1
        assert len(endpoint.hits) == 6
        assert "failed: 001.png, conversation_en: pairs[0] must be" in capsys.readouterr().err
        assert make(endpoint) == 1
        assert len(endpoint.hits) == 6
    assert [one["image"] for one in make.report["failed"]] == ["001.png", "002.png", "sub/000.png"]
    assert make.records == []


def test_prose_and_cut_json_are_mended(make: Maker) -> None:
    make.pictures(4)
    faults = itertools.cycle(["prose", "cut_json"])
    with Endpoint(lambda hit: next(faults)) as endpoint:
        assert make(endpoint) == 0
    assert set(make.statuses()) == {"ok"}
    assert sorted(len(record["conversations"]) for record in make.records) == [4, 4, 6, 6]


def test_refusals_are_listed_and_not_asked_again(make: Maker) -> None:
    make.pictures(4)
    faults = itertools.cycle(["refusal_text", "refusal_field"])
    with Endpoint(lambda hit: next(faults)) as endpoint:
        assert make(endpoint) == 0
        assert make(endpoint) == 0
        assert len(endpoint.hits) == 4
    assert make.report["dropped"] == {"refusal": 4}


def test_rate_limits_are_waited_for_by_all(make: Maker) -> None:
    make.pictures(12)
    with Endpoint(lambda hit: "limited" if hit.order in range(3, 8) else "") as endpoint:
        assert make(endpoint, "--concurrency", "6") == 0
    assert len(endpoint.hits) == 17
    # Nobody calls in the 0.4 s that the endpoint asks for: the longest silence is at least that.
    assert max(after - before for before, after in itertools.pairwise(endpoint.times)) > 0.35


def test_a_limit_that_is_too_long_stops_a_run_that_goes_on_later(
    make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(4)
    with Endpoint(lambda hit: "limited_long" if hit.order == 2 else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 1
        assert "stopped: the endpoint asks to wait 7200 s" in capsys.readouterr().err
        assert len(make.records) == 2
        assert make(endpoint) == 0
    assert len(make.records) == 4
    assert set(endpoint.served.values()) == {1}


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_no_call_takes_longer_than_its_time(make: Maker, fault: str) -> None:
    make.pictures(2)
    began = time.monotonic()
    with Endpoint(once(fault)) as endpoint:
        assert make(endpoint, "--timeout-seconds", "0.5") == 0
    assert make.statuses().count("failed") == 2
    assert "timeout" in next(line["reason"] for line in make.journal if line.get("status") == "failed")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error_401", "refuses the key; put the right one in DIANJING_API_KEY or OPENAI_API_KEY"),
        ("redirect", "sends calls elsewhere"),
        ("no_quota", "has nothing left to spend"),
        ("error_400", "accepts no request"),
        ("error_500", "accepts no request"),
    ],
)
def test_what_no_call_can_pass_stops_the_run(
    make: Maker, fault: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(20)
    with Endpoint(lambda hit: fault) as endpoint:
        assert make(endpoint) == 2
    assert message in capsys.readouterr().err
    assert len(endpoint.hits) <= send.PROBES * (send.RETRIES + 1) * 3


def test_a_run_ends_when_nothing_comes_back_any_more(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(40)
    with Endpoint(lambda hit: "error_500" if hit.order > 2 else "") as endpoint:
        assert make(endpoint) == 1
    assert "10 requests in a row brought nothing usable, the last one: HTTP 500" in capsys.readouterr().err
    assert len(make.records) == 3


def test_a_model_that_writes_no_json_is_not_paid_for_long(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(40)
    with Endpoint(lambda hit: "small_talk") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 1
    assert len(endpoint.hits) == 2 * send.MOST_FAILURES
    assert "can be asked with --questions" in capsys.readouterr().err


def test_one_picture_that_is_not_liked_fails_alone(make: Maker) -> None:
    names = make.pictures(5)
    with Endpoint(lambda hit: "error_400" if hit.order == 2 else "") as endpoint:
        assert make(endpoint, "--concurrency", "1") == 1
    assert [record["image"] for record in make.records] == [*names[:2], *names[3:]]
    (failed,) = make.report["failed"]
    assert (failed["image"], failed["reason"]) == (names[2], "HTTP 400: I do not like this picture")


def no_schema(hit: Hit) -> str:
    return "no_format" if hit.response_format == "json_schema" else ""


def no_format(hit: Hit) -> str:
    return "no_format" if hit.response_format else ""


def ignores_format(hit: Hit) -> str:
    return "prose"


@pytest.mark.parametrize(
    ("behaviour", "rung", "tried"),
    [
        (lambda hit: "", "json_schema", ["json_schema"]),
        (no_schema, "json_object", ["json_schema", "json_object"]),
        (no_format, "text", ["json_schema", "json_object", "text"]),
        (ignores_format, "text", ["json_schema"]),
    ],
    ids=["schema", "object", "neither", "ignored"],
)
def test_json_is_asked_for_as_strictly_as_the_endpoint_knows(
    make: Maker, behaviour: Behaviour, rung: str, tried: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(4)
    with Endpoint(behaviour) as endpoint:
        assert make(endpoint) == 0
    assert f"replies are asked for as: {rung}" in capsys.readouterr().err
    asked = [hit.response_format or "text" for hit in endpoint.hits]
    assert asked == tried + [rung] * 3


def test_newer_models_want_another_name_for_the_token_limit(make: Maker) -> None:
    make.pictures(3)
    with Endpoint(lambda hit: "no_max_tokens" if "max_tokens" in hit.body else "") as endpoint:
        assert make(endpoint) == 0
    assert sum("max_tokens" in hit.body for hit in endpoint.hits) == 1


def test_the_key_is_sent_and_written_nowhere(
    make: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(4)
    monkeypatch.setenv("DIANJING_API_KEY", KEY)
    faults = itertools.cycle(["echo_key", "error_with_key", "echo_key"])
    with Endpoint(lambda hit: next(faults)) as endpoint:
        make(endpoint, "--concurrency", "1")
    with Endpoint(lambda hit: "error_401") as other:
        make(other)
    assert {hit.authorization for hit in endpoint.hits} == {f"Bearer {KEY}"}
    written = "".join(path.read_text() for path in make.out.parent.glob("data*"))
    said = capsys.readouterr()
    assert "It reads Bearer *** in red." in written
    assert KEY not in written + said.out + said.err
    assert "\x1b[31m" not in said.err


def test_at_most_as_many_at_once_as_wished(make: Maker) -> None:
    make.pictures(12)
    with Endpoint(delay_seconds=0.05) as endpoint:
        assert make(endpoint, "--concurrency", "3") == 0
    assert endpoint.most_at_once == 3


def test_replies_do_not_depend_on_the_order_they_come_in(make: Maker) -> None:
    make.pictures(10)
    with Endpoint() as endpoint:
        make(endpoint, "--concurrency", "1")
        other = make.out.parent / "other" / "data.json"
        make(endpoint, "--concurrency", "8", out=other)
    assert other.read_bytes() == make.out.read_bytes()
