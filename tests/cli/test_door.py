"""Help, a look at records, and errors about folders and files come before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dianjing.cli.main import VERBS

SLOW = ("torch", "transformers")
SCRIPT = """
import json, sys
from dianjing.cli.main import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    print(json.dumps([code, [name for name in ("torch", "transformers") if name in sys.modules]]), file=sys.stderr)
"""
TRAIN = [
    *("train", "tinyworld_pretrain", "--data.path", "data.json", "--data.images", ""),
    *("--train.sample-every", "0", "--output"),
]
ERRORS = {
    "held: it already holds a run, up to step-000001": [*TRAIN, "held"],
    "new: there is no checkpoint in it": [*TRAIN, "new", "--resume"],
    "nowhere: no such language model folder": [*TRAIN, "new", "--language-model.folder", "nowhere"],
    "held: there is no config.json": [*TRAIN, "new", "--vision-tower.folder", "held"],
    "odd/config.json: not JSON": [*TRAIN, "new", "--vision-tower.folder", "odd"],
    "nowhere.json: cannot be read": [*TRAIN, "new", "--data.path", "nowhere.json"],
    "nowhere: there is no such image folder": [*TRAIN, "new", "--data.images", "nowhere"],
    "nowhere: no such run or checkpoint": [*TRAIN, "new", "--projector.init-from", "nowhere"],
    "held_out.json: cannot be read": [*TRAIN, "new", "--train.sample-every", "5"],
    "far/away: no such vision tower folder": ["plan", "tinyworld_pretrain", "--vision-tower.folder", "./far/away"],
    "none.json: cannot be read": ["show", "none.json", "--llm", "tinyworld"],
}


def slow_after(folder: Path, *commands: list[str]) -> list[tuple[int, str, list[str]]]:
    """Run commands in one process; return the exit code of each, what it says, and what has been imported by then."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    found, said = [], ""
    for line in done.stderr.splitlines():
        if line.startswith("["):
            code, imported = json.loads(line)
            found.append((code, said, imported))
            said = ""
        else:
            said += line
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    said = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "That one."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "conversations": said}]), encoding="utf-8")
    (tmp_path / "held" / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{", encoding="utf-8")
    return tmp_path


def test_help_of_every_verb_is_quick(folder: Path) -> None:
    found = slow_after(folder, *([verb, "--help"] for verb in VERBS))
    assert found == [(0, "", [])] * len(VERBS)


def test_errors_about_folders_and_files_are_quick(folder: Path) -> None:
    found = slow_after(folder, *ERRORS.values())
    assert [(code, slow) for code, _, slow in found] == [(2, [])] * len(ERRORS)
    for (_, said, _), message in zip(found, ERRORS, strict=True):
        assert message in said


def test_records_are_shown_without_torch(folder: Path) -> None:
    ((code, said, slow),) = slow_after(folder, ["show", "data.json", "--llm", "tinyworld"])
    assert (code, slow) == (0, ["transformers"]), said
