"""A run that was killed with -9 in mid-epoch and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.errors import CheckpointError, ConfigError
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.journal import read_journal
from dianjing.run.layout import checkpoints
from dianjing.train.loop import train

STAGES = {
    "pretrain": {},
    "finetune": {
        "language_model": {"tuning": "lora", "lora_dropout": 0.1},
        "vision_tower": {"tuning": "lora", "lora_dropout": 0.1},
    },
    "full": {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}},
}
STEPS = 72
TRAIN = {"global_batch_size": 3, "epochs": 24, "save_every": 10, "warmup_ratio": 0.1, "log_every": 5}
"""Three steps an epoch, so that the first checkpoint, and most, are in the middle of one."""


@pytest.fixture(params=STAGES)
def recipe(request: pytest.FixtureRequest, make_recipe: Any, tmp_path: Path) -> Recipe:
    stage = "pretrain" if request.param == "pretrain" else "finetune"
    recipe = make_recipe(stage, train=TRAIN, **STAGES[request.param])
    return replace(recipe, output=str(tmp_path / "straight"))


def learned(run: Path) -> dict[str, bytes]:
    """Return what a run ended with: weights, optimizer state and the place in the data."""
    return {path.name: path.read_bytes() for path in newest(run).iterdir() if path.name != "manifest.json"}


def start_and_kill(recipe: Recipe, number: int) -> int:
    """Run `dianjing train` until its first checkpoint, then send a signal; return the exit code."""
    file = Path(f"{recipe.output}.toml")
    save_recipe(recipe, file)
    run = Path(recipe.output)
    process = subprocess.Popen([sys.executable, "-m", "dianjing", "train", str(file), "--quiet"])
    while not checkpoints(run):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    return process.wait()


def test_killed_and_resumed_is_straight(recipe: Recipe, tmp_path: Path) -> None:
    straight = train(recipe, quiet=True)
    again = train(replace(recipe, output=str(tmp_path / "again")), quiet=True)
    assert learned(straight) == learned(again), "the control: two straight runs"

    killed = replace(recipe, output=str(tmp_path / "killed"))
    assert start_and_kill(killed, signal.SIGKILL) == -signal.SIGKILL
    at = read_state(newest(Path(killed.output)))
    assert 0 < at.step < at.total_steps == STEPS
    train(killed, resume=True, quiet=True)
    assert learned(Path(killed.output)) == learned(straight)
    losses, expected = ([row["loss"] for row in read_journal(run)] for run in (Path(killed.output), straight))
    assert losses == expected


def test_any_step_can_be_the_last_before(make_recipe: Any, tmp_path: Path) -> None:
    lora = {"tuning": "lora", "lora_dropout": 0.1}
    recipe = make_recipe("finetune", language_model=lora, train={**TRAIN, "epochs": 2, "save_every": 1, "keep": 9})
    straight = train(replace(recipe, output=str(tmp_path / "straight")), quiet=True)
    for checkpoint in checkpoints(straight)[:-1]:
        run = tmp_path / f"from-{checkpoint.name}"
        shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
        train(replace(recipe, output=str(run)), resume=True, quiet=True)
        assert learned(run) == learned(straight), checkpoint.name


def test_a_polite_stop_writes_a_checkpoint_and_says_how_to_go_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = replace(make_recipe(train=TRAIN), output=str(tmp_path / "straight"))
    straight = train(recipe, quiet=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        stopped = replace(recipe, output=str(tmp_path / number.name))
        assert start_and_kill(stopped, number) == 128 + number
        assert read_state(newest(Path(stopped.output))).step < STEPS
        train(stopped, resume=True, quiet=True)
        assert learned(Path(stopped.output)) == learned(straight)


def test_what_may_change_between_may_change(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe("finetune", language_model={"tuning": "lora"}, train={**TRAIN, "max_steps": 8})
    straight = train(replace(recipe, output=str(tmp_path / "straight")), quiet=True)
    half = replace(recipe, output=str(tmp_path / "half"))
    run = train(replace(half, train=replace(half.train, save_every=3)), quiet=True)
    shutil.rmtree(newest(run))
    changed = replace(
        half,
        data=replace(half.data, workers=2),
        train=replace(half.train, save_every=5, keep=1, log_every=3, gradient_checkpointing="on"),
    )
    train(changed, resume=True, quiet=True)
    assert learned(run)["trainable.safetensors"] == learned(straight)["trainable.safetensors"]


def test_changed_data_or_recipe_are_an_error(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={**TRAIN, "epochs": 1})
    train(recipe, quiet=True)
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        train(replace(recipe, seed=1), resume=True, quiet=True)
    records = json.loads(Path(str(recipe.data.path)).read_text(encoding="utf-8"))
    records[0]["conversations"][1]["value"] = "It is bed."
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    other = replace(recipe, data=replace(recipe.data, path=str(tmp_path / "data.json")))
    with pytest.raises(CheckpointError, match="the data: positions was 407, is 408"):
        train(other, resume=True, quiet=True)


def test_a_run_is_not_written_over(make_recipe: Any) -> None:
    recipe = make_recipe(train={**TRAIN, "epochs": 1})
    run = train(recipe, quiet=True)
    with pytest.raises(ConfigError, match=r"it already holds a run, up to step-000003; give --resume"):
        train(recipe, quiet=True)
    before = learned(run)
    train(recipe, resume=True, quiet=True)  # finished: nothing is left to do
    assert learned(run) == before
