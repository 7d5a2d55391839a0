"""`dianjing make` from the command line: what it refuses, and its prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dianjing.cli.main import main
from dianjing.make.prompts import shipped_prompts
from tests.chaos.pictures import write_pictures

URL = "http://127.0.0.1:9/v1"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", 2)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--base-url is needed"),
        (["--base-url", "127.0.0.1:8000"], "not an address"),
        (["--base-url", "https://me:secret@host/v1"], "--base-url of host: it holds a user name"),
        (["--base-url", "https://host/v1?key=secret"], "--base-url of host: it holds"),
        (["--base-url", URL, "--max-cost", "3"], "--max-cost needs --price-in and --price-out"),
        (["--base-url", URL, "--price-in", "3"], "belong together"),
        (["--base-url", URL, "--pairs", "0"], "--pairs 0: at least 1"),
        (["--base-url", URL, "--temperature", "nan"], "--temperature nan: at least 0"),
        (["--base-url", URL, "--held-out", "0.6"], "at most 0.5"),
        (["--base-url", URL, "--prompts", "captoin"], "did you mean 'caption'"),
        (["--base-url", URL, "--questions", "none.txt"], "none.txt: cannot be read"),
        (["--batch-in", "a", "--batch-out", "b"], "give one"),
        (["--batch-in", "none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    images: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = images.parent / "data.json"
    assert main(["make", str(images), "--out", str(out), "--model", "m", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "secret" not in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [("data.jsonl", "ends in .json"), ("mine.json", "has no journal (mine.journal.jsonl) next to it")],
)
def test_an_output_that_is_not_ours_is_left_alone(
    images: Path, out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = images.parent / out
    mine.write_text("[]")
    assert main(["make", str(images), "--out", str(mine), "--model", "m", "--base-url", URL]) == 2
    assert message in capsys.readouterr().err
    assert mine.read_text() == "[]"


def test_held_out_records_are_not_let_back_into_training(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images.parent / "data_held_out.json").write_text("[]")
    out = images.parent / "data.json"
    assert main(["make", str(images), "--out", str(out), "--model", "m", "--base-url", URL]) == 2
    assert "give --held-out again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "warned"), [("http://example.org", True), ("https://example.org", False), (URL, False)]
)
def test_a_key_in_clear_is_warned_of(
    images: Path, host: str, warned: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    arguments = ["make", str(images), "--out", str(images.parent / "data.json"), "--model", "m", "--dry-run"]
    assert main([*arguments, "--base-url", host]) == 0
    said = capsys.readouterr()
    assert ("the key and the pictures go over the network in clear" in said.err) is warned
    assert host in " ".join(said.out.split())
    assert "sk-very-secret" not in said.out + said.err


def test_prompts_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", "prompts"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_prompts())
    assert main(["make", "prompts", "copy", "caption_zh", str(tmp_path)]) == 0
    copied = tmp_path / "caption_zh.txt"
    assert capsys.readouterr().out.strip() == str(copied)
    assert copied.read_bytes() == shipped_prompts()["caption_zh"].read_bytes()
    assert main(["make", "prompts", "copy", "caption_zh", str(tmp_path)]) == 2
    assert main(["make", "prompts", "copy", "caption"]) == 2
    assert "no such shipped prompt" in capsys.readouterr().err


def test_an_endpoint_that_is_not_there_is_a_user_error(images: Path) -> None:
    pytest.importorskip("openai", reason="dianjing make needs openai: pip install openai")
    script = "import sys, dianjing.make.send as w; w.RETRY_SECONDS = 0.01; from dianjing.cli.main import main\n"
    arguments = ["make", str(images), "--out", str(images.parent / "data.json"), "--model", "m", "--base-url", URL]
    command = [sys.executable, "-c", f"{script}sys.exit(main({arguments!r}))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "stopped: the endpoint accepts no request: no connection:" in done.stderr
    assert "Traceback" not in done.stderr
    assert "6 calls, 0 without an answer" in done.stderr
