"""`dianjing export` from the command line: what it writes can be used as its card says; what goes wrong is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.config.load import save_recipe
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, write_run
from tests.tiny import write_clip, write_llm, write_siglip

LORA = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> str:
    recipe = make_recipe("finetune", **LORA)
    return str(write_run(recipe, loaded_model(recipe)))


@pytest.mark.parametrize("format", ["hf", "adapter"])
def test_the_card_tells_how_it_is_loaded(
    run: str, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["export", run, str(out), "--format", format]) == 0
    assert "run and export agree on" in capsys.readouterr().err
    card = (out / "README.md").read_text(encoding="utf-8")
    for fact in ("LoRA (rank 4, alpha 128)", "internlm2_chat", "licence of each base model", "点睛", "4 seen"):
        assert fact in card
    monkeypatch.chdir(out)
    for block in PYTHON.findall(card):
        exec(block, {})
    assert capsys.readouterr().out
    answers = []
    for model in (run, "."):
        assert main(["chat", model, "--prompt", "Hello!", "--max-new-tokens", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_what_lies_beside_an_export_stays(run: str, tmp_path: Path) -> None:
    kept = tmp_path / "beside" / "out.unproven" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    assert main(["export", run, str(tmp_path / "beside/out"), "--format", "adapter"]) == 0
    assert kept.read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "beside").iterdir()) == ["out", "out.unproven"]
    assert (tmp_path / "beside/out").stat().st_mode == kept.parent.stat().st_mode


def test_fewer_bits_say_what_they_cost(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", run, str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    cost = json.loads((tmp_path / "out" / "parity.json").read_text())["max_rounding_difference"]
    assert f"rounding to bf16 moves the logits by up to {cost:.1e}" in capsys.readouterr().err


def test_an_adapter_can_be_exported_merged(run: str, tmp_path: Path) -> None:
    """As an export of the run itself, but for the card, which no longer knows the data."""
    assert main(["export", run, str(tmp_path / "adapter"), "--format", "adapter"]) == 0
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert main(["export", run, str(tmp_path / "direct")]) == 0
    merged, direct = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "direct"))
    assert merged == direct


def test_a_base_that_moved(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_llm(tmp_path / "llm")
    recipe = make_recipe("finetune", language_model={"folder": str(folder), "tuning": "lora"})
    run = write_run(recipe, loaded_model(recipe))
    shutil.rmtree(folder)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"its language model is not there any more ({folder}: no such language model folder" in said
    assert f"language_model.folder in {run / 'recipe.toml'}" in said


def test_a_full_disk(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert main(["export", run, str(tmp_path / "out")]) == 2
    assert re.search(r"takes [\d,]+ bytes, but only 1,000 are free on this disk; make room", capsys.readouterr().err)

    def no_space(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr("dianjing.export.hf.save_tokenizer", no_space)
    assert main(["export", run, str(tmp_path / "out")]) == 2
    assert "out: cannot be written: [Errno 28] No space left on device; make room" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_a_place_that_cannot_be_written(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["export", run, str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_format_that_is_not_there(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", run, str(tmp_path / "out"), "--format", "onnx"])
    assert "gguf" in capsys.readouterr().err


def test_plan_and_train_say_which_formats_cannot_hold_the_model(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(make_recipe("pretrain", train={"max_steps": 1}), tmp_path / "recipe.toml")
    given = [str(tmp_path / "recipe.toml"), "--vision-tower.folder"]
    clip, siglip = str(write_clip(tmp_path / "clip")), str(write_siglip(tmp_path / "siglip"))
    for tower, refusing in ((clip, []), (siglip, ["xtuner", "llava"])):
        assert main(["plan", *given, tower, "--json"]) == 0
        assert [*json.loads(capsys.readouterr().out)["not_exported_to"]] == refusing
        for verb in ("plan", "train"):
            assert main([verb, *given, tower, "--output", str(tmp_path / f"run{len(refusing)}")]) == 0
            shown = "".join(capsys.readouterr())
            assert re.findall("this run will not export to (.*?): ", shown) == refusing
    assert main(["train", *given, siglip, "--output", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert "will not export" not in "".join(capsys.readouterr())
