"""The README's recipes and commands, run in its order on tiny stand-ins for the models and data it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from dianjing.cli.main import main
from tests.house.source import ROOT
from tests.tiny import TinyDataset

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^dianjing (.*)$", README, re.MULTILINE)
RECIPES = re.findall(r"^```toml\n(# (\S+)\n.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader(
    tmp_path: Path, tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Return a working folder in which all files that the README names exist."""
    shutil.copytree(tiny_llm, tmp_path / "models" / "my-chat-llm")
    shutil.copytree(tiny_clip, tmp_path / "models" / "clip-vit-large-patch14-336")
    shutil.copytree(tiny_dataset.images, tmp_path / "data" / "images")
    for name in ("captions", "conversations", "held-out"):
        shutil.copy(tiny_dataset.path, tmp_path / "data" / f"{name}.json")
    shutil.copy(tiny_dataset.images / "wide.png", tmp_path / "cat.jpg")
    for text, name in RECIPES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(reader: Path) -> None:
    assert len(COMMANDS) >= 8
    assert len(RECIPES) == 2
    for command in COMMANDS:
        assert main(shlex.split(command, comments=True)) == 0, command
    made = ("runs/eyes-pretrain/loss.svg", "runs/eyes/train.jsonl", "compare.html", "my-llava/parity.json")
    assert all((reader / name).is_file() for name in made)
