"""`dianjing train --gpus N`: N processes that start, stop and fail as one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.main import main
from dianjing.config.load import save_recipe
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.layout import checkpoints
from dianjing.train import shards as module
from dianjing.train.loop import train
from tests.tiny import TinyDataset

TIMEOUT_SECONDS = 240


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dianjing", "train", *arguments, "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_to_the_launcher_stops_all_ranks_and_another_number_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={"global_batch_size": 4, "epochs": 60, "save_every": 10})
    save_recipe(recipe, tmp_path / "recipe.toml")
    process = start(str(tmp_path / "recipe.toml"), "--gpus", "2", "--engine", "fsdp2")
    while not checkpoints(Path(recipe.output)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 130, errors
    assert errors.count("stopping after this step") == errors.count("stopped after step") == 1
    again = f"dianjing train {tmp_path / 'recipe.toml'} --gpus 2 --engine fsdp2 --quiet --resume"
    assert f", with a checkpoint; go on with: {again}\n" in errors
    assert 10 <= read_state(newest(Path(recipe.output))).step < 120
    train(recipe, resume=True, quiet=True)
    assert read_state(newest(Path(recipe.output))).step == 120


def test_ranks_end_with_their_launcher(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={"epochs": 5000, "save_every": 10})
    save_recipe(recipe, tmp_path / "recipe.toml")
    launcher = start(str(tmp_path / "recipe.toml"), "--gpus", "2")
    run = Path(recipe.output)
    while not checkpoints(run):
        assert launcher.poll() is None
        time.sleep(0.02)
    writer = int((run / "run.lock").read_text().split()[1])
    launcher.kill()
    launcher.communicate(timeout=TIMEOUT_SECONDS)  # the ranks hold its pipes
    for _ in range(600):
        if not Path(f"/proc/{writer}").exists():
            break
        time.sleep(0.1)
    else:
        os.kill(writer, signal.SIGKILL)
        pytest.fail("a rank outlived its launcher by a minute")
    assert 0 < read_state(newest(run)).step < 10_000


def test_an_error_on_one_rank_ends_all_and_is_told_once(
    make_recipe: Any, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    """The second of four records is rank 1's; its picture has a good header and no more."""
    images = tmp_path / "images"
    shutil.copytree(tiny_dataset.images, images)
    content = (images / "tall.jpg").read_bytes()
    (images / "tall.jpg").write_bytes(content[: len(content) * 3 // 4])
    recipe = make_recipe(data={"order": "sequential", "images": str(images)})
    save_recipe(recipe, tmp_path / "recipe.toml")
    process = start(str(tmp_path / "recipe.toml"), "--gpus", "2")
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, output) == (2, ""), errors
    assert errors.count("error: ") == 1, errors
    assert "tall" in errors
    assert "Traceback" not in errors


def test_an_error_on_all_ranks_is_told_once_too(make_recipe: Any, tmp_path: Path) -> None:
    save_recipe(make_recipe(data={"max_tokens": 20}), tmp_path / "recipe.toml")
    process = start(str(tmp_path / "recipe.toml"), "--gpus", "2")
    _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    assert errors.count("error: 8 records cannot be used") == errors.count("error: ") == 1, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: this machine has 0 GPUs"),
        (["--engine", "deepspeed_zero2"], "DeepSpeed is not installed: "),
        (
            ["--engine", "fsdp2", "--train.sample-every", "5", "--train.sample-path", "held_out.json"],
            "train.sample_every: fsdp2 leaves no rank with a whole",
        ),
    ],
)
def test_what_is_refused(
    make_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held_out.json").write_text("[]", encoding="utf-8")
    save_recipe(make_recipe(), tmp_path / "recipe.toml")
    assert main(["train", str(tmp_path / "recipe.toml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_launcher_is_seen(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_recipe(make_recipe(), tmp_path / "recipe.toml")
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert main(["train", str(tmp_path / "recipe.toml"), "--gpus", "2"]) == 2
    assert "under torchrun or accelerate launch leave it out" in capsys.readouterr().err
    monkeypatch.delitem(os.environ, "WORLD_SIZE")
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", str(tmp_path / "recipe.toml")]) == 2
    assert "launch plainly, the recipe chooses: train.engine is ddp" in capsys.readouterr().err
