"""What a user can do wrong with chat, compare, eval and export: exit code 2, what is wrong, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dianjing.cli.main import main
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, picture, write_run
from tests.tiny import TinyDataset

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a verb that must fail and return what it says."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "Traceback" not in shown.err
        before, error, said = shown.err.partition("error: ")
        assert error
        assert not before.strip() or "Loading weights" in before
        return said

    return run


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Return a picture that ends too early."""
    picture(64, 64).save(tmp_path / "whole.jpg")
    path = tmp_path / "broken.jpg"
    path.write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    return path


def write_data(folder: Path, *records: dict) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(list(records)))
    return path


def record(name: str, image: str | None, question: str = "<image>\nWhat?") -> dict:
    conversation = [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}]
    return {"id": name, "image": image, "conversations": conversation}


def test_no_such_model(fails: Fails, tmp_path: Path, tiny_dataset: TinyDataset) -> None:
    assert "no such folder" in fails("chat", tmp_path / "nowhere", "--prompt", "Hello!")
    assert "no such folder" in fails("eval", tmp_path / "nowhere", tiny_dataset.path, "--images", tiny_dataset.images)
    assert "no such folder" in fails("export", tmp_path / "nowhere", tmp_path / "out")
    assert "recipe.toml" in fails("chat", tmp_path, "--prompt", "Hello!")


def test_pictures_in_a_chat(fails: Fails, tiny_llm: Path, broken: Path) -> None:
    assert "no such file" in fails("chat", tiny_llm, "--image", broken.with_name("none.png"), "--prompt", "What?")
    assert "broken.jpg" in fails("chat", tiny_llm, "--image", broken, "--prompt", "What?")


def test_flags_of_no_use(fails: Fails, tiny_llm: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    assert "--temperature" in fails("chat", tiny_llm, "--prompt", "What?", "--temperature", "-1")
    assert "--top-p" in fails("chat", tiny_llm, "--prompt", "What?", "--top-p", "0")
    assert "--limit" in fails("eval", tiny_llm, tiny_dataset.path, "--limit", "-1")
    assert "no model" in fails("compare", "--data", tiny_dataset.path, "--out", tmp_path / "x.html")


def test_all_bad_pictures_are_named_before_a_model_is_loaded(fails: Fails, tmp_path: Path, broken: Path) -> None:
    data = write_data(
        tmp_path,
        record("one", "broken.jpg"),
        record("two", "none.jpg"),
        record("three", "../outside.jpg"),
        record("four", "whole.jpg"),
    )
    for verb in (("eval", "nowhere", data), ("compare", "nowhere", "--data", data, "--out", tmp_path / "x.html")):
        said = fails(*verb)
        assert "3 pictures cannot be used" in said
        assert all(f'record "{name}"' in said for name in ("one", "two", "three"))
    assert not (tmp_path / "x.html").exists()


def test_bad_records(fails: Fails, tiny_llm: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, record("marks", None))
    assert '"marks"' in fails("eval", tiny_llm, data)
    assert "cannot be read" in fails("eval", tiny_llm, tmp_path / "none.json")
    assert "cannot be read" in fails("compare", tiny_llm, "--data", tmp_path / "none.json", "--out", "x.html")


def test_exports_that_cannot_be(fails: Fails, make_recipe: MakeRecipe, tiny_llm: Path, tmp_path: Path) -> None:
    recipe = make_recipe("pretrain")
    run = write_run(recipe, loaded_model(recipe))
    assert "text-only" in fails("export", tiny_llm, tmp_path / "out")
    assert "already there" in fails("export", run, tmp_path)
    assert "cannot be read" in fails("export", run, tmp_path / "out", "--data", tmp_path / "none.json")
    (run / "checkpoints/step-000001/manifest.json").unlink()
    assert "no checkpoint is whole" in fails("export", run, tmp_path / "out")
    assert "File name too long" in fails("export", run, tmp_path / ("x" * 300))
    assert "Not a directory" in fails("export", run, run / "recipe.toml" / "out")
    assert "the name is not UTF-8" in fails("export", run, tmp_path / os.fsdecode(b"out\xff"))
    (tmp_path / "out link").symlink_to(tmp_path / "nowhere")
    assert "already there" in fails("export", run, tmp_path / "out link")
    (tmp_path / "out link").unlink()
    assert not list(tmp_path.glob("out*"))


def test_paths_too_long_are_said(fails: Fails, tmp_path: Path) -> None:
    assert "File name too long; name another" in fails("chat", "x" * 300, "--prompt", "Hello!")
    assert "File name too long; name another" in fails("export", "x" * 300, tmp_path / "out")


@pytest.mark.parametrize("out", ["file/x.html", "x" * 300, "."])
def test_a_page_that_cannot_be_written_is_said_before_a_question_is_asked(
    fails: Fails, tiny_dataset: TinyDataset, tmp_path: Path, out: str
) -> None:
    (tmp_path / "file").touch()
    said = fails(
        "compare", "nowhere", "--data", tiny_dataset.path, "--images", tiny_dataset.images, "--out", tmp_path / out
    )
    assert said.startswith(f"--out {tmp_path / out}: cannot be written: ")


def test_a_fresh_process_says_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dianjing", "chat", str(tmp_path / "nowhere"), "--prompt", "Hello!"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert "no such folder" in done.stderr


def test_eval_refuses_flags_that_would_not_be_used(fails: Fails, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    assert "--out belongs to --benchmark" in fails("eval", "tinyworld", data, "--out", tmp_path / "out")
    asked = ("eval", "tinyworld", data, "--benchmark", "pope")
    assert "--json does not go with --benchmark" in fails(*asked, "--json", tmp_path / "scores.json")
    assert "--max-new-tokens does not go with --benchmark" in fails(*asked, "--max-new-tokens", 8)
