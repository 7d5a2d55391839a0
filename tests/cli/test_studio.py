"""`dianjing studio` as a command: what cannot be started is said in a sentence, and it ends in peace."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from dianjing.cli.main import main
from tests.tiny import TinyDataset


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "there is no such folder; a data file is named with --data"),
        (["--data", "nowhere.json"], "cannot be read"),
        (["--data", "data.txt"], "must end in .json"),
        (["--data", "data.json", "--images", "nowhere"], "no such image folder"),
        (["--images", "."], "go with --data"),
        (["--base-url", "http://127.0.0.1:1/v1"], "belong together"),
        (["--data", "data.json", "--base-url", "ftp://x", "--model-name", "m"], "not an address"),
        (["--recipe", "nowhere.toml"], "there is no such recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_started_is_said(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIANJING_ONLINE", "0")  # the verb sets it; put back afterwards
    (tmp_path / "data.json").write_text(json.dumps([{"id": "a"}]))
    assert main(["studio", *flags, "--no-browser"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl") == ["data.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_in_peace(number: signal.Signals, tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    data = tmp_path / "data.json"
    data.write_bytes(tiny_dataset.path.read_bytes())
    flags = ["--data", str(data), "--images", str(tiny_dataset.images), "--port", "0", "--no-browser"]
    command = [sys.executable, "-m", "dianjing", "studio", str(tmp_path), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = process.stderr.readline().split()[4]
        with urllib.request.urlopen(f"{address}state") as answer:
            assert json.load(answer)["counts"]["all"] > 0
        # A second one on the same data is refused while the first runs.
        second = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        assert second.returncode == 2
        assert "another run is writing it" in second.stderr
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == 0
    assert said == "stopped\n"
