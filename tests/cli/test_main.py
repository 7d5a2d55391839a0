"""The program as a whole: which verbs there are, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dianjing import __version__
from dianjing.cli import main as module
from dianjing.cli.main import VERBS, main
from dianjing.config.load import load_recipe, shipped_recipes
from dianjing.errors import DianjingError


def test_help_is_quick_and_lists_every_verb() -> None:
    code = "import sys; from dianjing.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb, summary in VERBS.items():
        assert f"{verb:10}  {summary}" in done.stdout


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"dianjing {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_module_that_says_what_the_help_says(verb: str) -> None:
    found = importlib.import_module(f"dianjing.cli.{verb}")
    assert (verb, VERBS[verb]) == (found.NAME, found.SUMMARY)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([verb, "--help"])
    except SystemExit as exit:  # argparse's way
        code = exit.code
    assert code == 0
    assert f"usage: dianjing {verb}" in capsys.readouterr().out


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'trian'; did you mean 'train'?\n"
    assert main(["fly"]) == 2
    assert "there are demo, make, check, recipes, show" in capsys.readouterr().err


def test_help_as_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["help"], ["-h"]):
        assert main(arguments) == 0
        assert "usage: dianjing VERB ..." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["help", "train"])
    assert "usage: dianjing train" in capsys.readouterr().out
    assert main(["help", "trian"]) == 2


@pytest.mark.parametrize("verb", module.ELSEWHERE)
def test_the_verbs_of_xtuner_name_ours(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb not in VERBS
    assert main([verb, "x", "--y"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: '{verb}' is called otherwise here: dianjing ")
    assert {*re.findall(r"dianjing ([\w-]+)", said)} <= {*VERBS}


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_list_of_verbs_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    lines = module._help().splitlines()
    assert max(map(len, lines[:-1])) <= columns
    assert " ".join(VERBS["show"].split()) in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DianjingError("x is y; do z"), 2, "error: x is y; do z\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(28, "No space left", "f"), 2, "error: f: No space left; make room on that disk\n"),
        (OSError(28, "No space left"), 2, "error: a file: No space left; make room on that disk\n"),
        (PermissionError(13, "No", "f"), 2, "error: f: No; name another, or see that it can be read and written\n"),
    ],
)
def test_how_a_failed_verb_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def fail(verb: str, arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr(module, "_run", fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == message


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(verb: str, arguments: list[str]) -> int:
        raise FileNotFoundError(2, "No such file")

    monkeypatch.setattr(module, "_run", fail)
    with pytest.raises(FileNotFoundError):
        main(["train"])


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "dianjing", "fly"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown verb 'fly'")


@pytest.mark.parametrize("arguments", ["--help", "recipes", "train --help"])
def test_a_reader_that_has_enough(arguments: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m dianjing {arguments} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("image", "code"), [("there.png", 0), ("nowhere.png", 1)])
@pytest.mark.parametrize("flags", ["", "--json"])
def test_a_check_that_nobody_reads_to_its_end_keeps_its_exit_code(
    tmp_path: Path, image: str, code: int, flags: str
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "there.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "image": image, "conversations": said}]))
    command = f"set -o pipefail; {sys.executable} -m dianjing check {tmp_path}/data.json {flags} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_output_without_chinese(tmp_path: Path, encoding: str) -> None:
    said = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "\u5929"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "1", "conversations": said}]))
    command = [sys.executable, "-m", "dianjing", "show", str(tmp_path / "data.json"), "--llm", "tinyworld"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0
    assert b"\\u5929<|im_end|>" in done.stdout


def test_recipes_are_listed_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped_recipes())
    assert main(["recipes", "copy", "tinyworld_pretrain"]) == 0
    assert main(["recipes", "copy", "tinyworld_pretrain", "mine.toml"]) == 0
    assert capsys.readouterr().out.split() == ["tinyworld_pretrain.toml", "mine.toml"]
    assert load_recipe("mine.toml") == load_recipe("tinyworld_pretrain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinyworld_pretain"], "There are course_photo, "),
        ([], "name the recipe to copy: course_photo"),
        (["tinyworld_pretain"], "no such shipped recipe; did you mean 'tinyworld_pretrain'? There"),
        (["tinyworld_pretrain", "there.toml"], "there.toml: it already exists"),
        (["tinyworld_pretrain", "no/where.toml"], "there is no folder no"),
        (["tinyworld_pretrain", "x" * 300], "xxx: File name too long; name another"),
        (["tinyworld_pretrain", "/proc/x.toml"], "/proc/x.toml: "),
    ],
)
def test_a_recipe_that_cannot_be_copied(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").touch()
    assert main(["recipes", "copy", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_gpu_memory_grows_unless_told_otherwise(given: dict[str, str], expected: str | None) -> None:
    """Before torch is imported: the first library that asks for a GPU settles it."""
    code = "import dianjing, os, sys; print('torch' in sys.modules, os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    kept = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(expected)]
