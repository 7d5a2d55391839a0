"""`dianjing doctor`: what it finds on this machine, and what it says of planted faults."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.doctor import doctor
from dianjing.doctor.doctor import conflicts, packages


def test_this_machine_is_well_and_the_self_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_subject = {finding["subject"]: finding for finding in found["findings"]}
    assert found["well"]
    assert {
        "torch",
        "transformers",
        "device",
        "cache data",
        "packed == one by one",
        "export == run",
    } <= by_subject.keys()
    assert "(" in by_subject["a training step"]["words"]


def test_what_is_missing_or_old_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1.0", "peft": ""}
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions.get(name, installed(name)))
    found = {finding.subject: finding for finding in packages()}
    assert [found[name].state for name in ("torch", "peft", "numpy")] == ["wrong", "wrong", "well"]
    assert "1.0, but >=" in found["torch"].words
    assert "pip install 'peft" in found["peft"].words


def test_a_missing_extra_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: "" if name == "deepspeed" else installed(name))
    found = next(finding for finding in packages() if finding.subject == "extra deepspeed")
    assert (found.state, found.words) == ("optional", "not installed (deepspeed); pip install 'dianjing[deepspeed]'")


@pytest.mark.parametrize(("code", "state"), [(0, "well"), (1, "wrong")])
def test_a_torchvision_that_breaks_transformers_is_found(
    monkeypatch: pytest.MonkeyPatch, code: int, state: str
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        doctor.subprocess,
        "run",
        lambda *given, **named: subprocess.CompletedProcess([], code, "", "operator torchvision::nms does not exist\n"),
    )
    (found,) = conflicts()
    assert found.state == state
    assert ("nms" in found.words) == (state == "wrong")


def test_the_exit_code_says_whether_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_fits", lambda requirement: requirement.name != "rich")
    assert main(["doctor", "--skip-test"]) == 1
    assert capsys.readouterr().out.rstrip().endswith("1 wrong: rich")


def test_a_self_test_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from dianjing.doctor import self_test as module

    losses: list[Any] = []

    def leaking(model: Any, batch: Any) -> float:
        losses.append(batch)
        return 1.0

    monkeypatch.setattr(module, "forward_loss", leaking)
    (found,) = module.self_test()
    assert (found.subject, found.state) == ("packed == one by one", "wrong")
    assert losses
