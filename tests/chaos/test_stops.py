"""Runs that end early: killed, interrupted, out of money, or one of two; the next run goes on where they were."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.conftest import Maker
from tests.chaos.endpoint import Endpoint
from tests.chaos.kill_make import kill_and_compare

PRICES = ("--price-in", "1000", "--price-out", "10000")
"""A reply of the endpoint, 100 tokens in and 20 out, costs 0.3."""


@pytest.mark.timeout(120)
def test_kills_lose_no_answer_and_ask_nothing_twice(tmp_path: Path) -> None:
    outcome = kill_and_compare(tmp_path, kills=5, pictures=30, seed=3)
    assert outcome.kills >= 3
    assert outcome.lost == []
    assert outcome.asked_too_often == []
    assert outcome.hits <= outcome.sent
    assert outcome.same_file
    assert outcome.records > 15


def test_an_interrupted_run_waits_for_the_answers_under_way(make: Maker) -> None:
    make.pictures(30)
    with Endpoint(delay_seconds=0.1) as endpoint:
        command = ["make", str(make.images), "--out", str(make.out), "--model", "m", "--base-url", endpoint.url]
        process = subprocess.Popen(
            [sys.executable, "-m", "dianjing", *command, "--concurrency", "3"], stderr=subprocess.PIPE, text=True
        )
        while len(endpoint.hits) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130
        assert "stopping when the answers under way are here" in said
        asked = len(endpoint.hits)
        assert make.statuses() == ["ok"] * asked
        assert len(make.records) == asked < 30
        assert make(endpoint) == 0
        assert len(make.records) == len(endpoint.hits) == 30


def test_two_runs_on_one_journal_are_refused(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    from dianjing.make.journal import Journal
    from dianjing.make.run import journal_path

    make.pictures(1)
    with Journal(journal_path(make.out)), Endpoint() as endpoint:
        assert make(endpoint) == 2
        assert not endpoint.hits
    assert "another run is writing it" in capsys.readouterr().err


@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_the_most_it_may_cost_is_never_passed(
    make: Maker, concurrency: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make.pictures(20)
    limits = ("--max-cost", "3", "--max-tokens", "100", "--concurrency", concurrency)
    with Endpoint(delay_seconds=0.01) as endpoint:
        assert make(endpoint, *PRICES, *limits) == 1
        said = capsys.readouterr().err
        assert "stopped: --max-cost 3" in said
        # The worst case of a call is 1.1 or more: nothing is begun that could end above 3.
        paid = 0.3 * len(endpoint.hits)
        assert 1.5 <= paid <= 3
        assert f"cost {paid:.4f}" in said
        before = len(endpoint.hits)
        assert make(endpoint, *PRICES, *limits) == 1
        assert len(endpoint.hits) == before
        assert make(endpoint, *PRICES, "--max-cost", "50", "--max-tokens", "100") == 0
    assert set(endpoint.served.values()) == {1}
    assert len(make.records) == 20


def test_the_most_calls_are_counted_over_all_runs(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(12)
    with Endpoint() as endpoint:
        for most in (5, 5, 9):
            assert make(endpoint, "--max-requests", str(most)) == 1
            assert len(endpoint.hits) == most
            assert len(make.records) == most
            assert f"--max-requests {most} is reached" in capsys.readouterr().err
        assert make(endpoint, "--max-requests", "12") == 0
    assert set(endpoint.served.values()) == {1}


def test_a_replys_cost_without_usage_is_its_worst(make: Maker) -> None:
    make.pictures(2)
    with Endpoint(lambda hit: "no_usage") as endpoint:
        assert make(endpoint, *PRICES) == 0
    assert all(line["cost"] > 10 for line in make.journal if line.get("status") == "ok")


def test_a_dry_run_calls_and_writes_nothing(make: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    make.pictures(4)
    with Endpoint() as endpoint:
        assert make(endpoint, "--dry-run", *PRICES) == 0
        assert not endpoint.hits
        assert sorted(path.name for path in make.out.parent.iterdir()) == ["images"]
        shown = " ".join(capsys.readouterr().out.split())
        assert "requests 4" in shown
        assert "to ask 4" in shown
        make(endpoint, "--max-requests", "1")
        capsys.readouterr()
        written = {path: path.read_bytes() for path in make.out.parent.glob("data*")}
        assert make(endpoint, "--dry-run", *PRICES) == 0
        assert {path: path.read_bytes() for path in make.out.parent.glob("data*")} == written
    shown = " ".join(capsys.readouterr().out.split())
    assert "to ask 3" in shown
    # From the one reply: 3 times 100 tokens in and 20 out.
    assert "prompt tokens about 300 reply tokens about 60 cost about 0.90" in shown
