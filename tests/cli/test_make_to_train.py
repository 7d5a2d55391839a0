"""From pictures to a score by the commands that are printed, word for word."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from dianjing.cli.main import main
from dianjing.config.load import load_recipe
from tests.chaos.endpoint import Endpoint
from tests.chaos.pictures import write_pictures

pytest.importorskip("openai", reason="dianjing make needs openai: pip install openai")

KINDS = ("caption", "conversation")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "my photos", 8)
    return tmp_path


def make(*flags: str, images: str = "my photos") -> int:
    with Endpoint() as endpoint:
        return main(["make", images, "--out", "data.json", "--model", "m", "--base-url", endpoint.url, *flags])


def commands(said: str) -> Iterator[list[str]]:
    """Yield the command lines that a verb says come next, the tiny world in the place of models."""
    for line in said.splitlines():
        if line.removeprefix("next:").lstrip().startswith("dianjing "):
            for one in line.removeprefix("next:").split("&&"):
                yield [{"LLM": "tinyworld", "TOWER": "tinyworld"}.get(word, word) for word in shlex.split(one)[1:]]


def test_the_printed_commands_lead_from_pictures_to_a_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--prompts", *KINDS, "--held-out", "0.25") == 0
    after_make = list(commands(capsys.readouterr().err))
    assert [words[0] for words in after_make] == ["check", "show", "recipes"]
    for kind in KINDS:
        records = json.loads((folder / f"data_{kind}.json").read_text(encoding="utf-8"))
        assert {record["type"] for record in records} == {kind}
    for words in after_make:
        capsys.readouterr()
        assert main(words) == 0, words
    after_recipes = [words for words in commands(capsys.readouterr().err) if words[0] == "train"]
    assert [load_recipe(words[1]).data.path for words in after_recipes] == [
        "data_caption.json",
        "data_conversation.json",
    ]
    for words in after_recipes:
        short = ["--train.max-steps", "2", "--train.sample-every", "2", "--train.save-every", "2"]
        assert main([*words, *short, "--quiet"]) == 0
    run = load_recipe(after_recipes[-1][1]).output
    asked = ["--images", "my photos", "--max-new-tokens", "4", "--json", "scores.json"]
    assert main(["eval", run, "data_conversation_held_out.json", *asked]) == 0
    assert set(json.loads(Path("scores.json").read_text(encoding="utf-8"))["by_type"]) == {"conversation"}


def test_one_kind_goes_to_the_file_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make() == 0
    assert "next: dianjing check data.json --images 'my photos'\n" in capsys.readouterr().err
    assert make("--prompts", *KINDS) == 2
    assert "which now go to data_caption.json, data_conversation.json; remove it" in capsys.readouterr().err
    Path("data.json").unlink()
    assert make("--prompts", *KINDS) == 0
    assert not Path("data.json").exists()


def test_a_single_picture_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = next((folder / "my photos").glob("*.png"))
    picture.with_name(f"._{picture.name}").write_bytes(b"of macOS")
    assert make(images=str(picture)) == 0
    assert {record["image"] for record in json.loads(Path("data.json").read_text())} == {picture.name}


def test_what_is_missing_is_said_before_a_picture_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("dianjing.make.pictures.look", lambda *_: pytest.fail("a picture was read"))
    assert make() == 2
    assert "needs the package openai: " in capsys.readouterr().err
