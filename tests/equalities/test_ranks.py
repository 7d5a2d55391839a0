"""Two processes that share each step's records end with the weights of one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dianjing.config.load import save_recipe
from dianjing.config.schema import Recipe
from dianjing.train.checkpoint import checkpoints, newest, read_state
from dianjing.train.log import read_journal
from dianjing.train.loop import train

TIMEOUT_SECONDS = 240


def start_two(recipe: Recipe, *flags: str) -> list[subprocess.Popen[str]]:
    """Start `dianjing train` on two ranks that meet over gloo."""
    file = Path(f"{recipe.output}.toml")
    save_recipe(recipe, file)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "dianjing", "train", str(file), "--quiet", *flags]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit code and stderr of each; one that hangs is killed and fails the test."""
    try:
        errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@pytest.mark.parametrize("global_batch_size", [2, 7])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_two_ranks_equal_one(make_recipe: Any, tmp_path: Path, stage: str, global_batch_size: int) -> None:
    """In order, batches of two are [wide | tall], [text | square], [two | small], [again | chat].

    So there are steps in which one rank has no picture. Of seven, the second step is [chat | nothing].
    """
    lora = {"tuning": "lora"} if stage == "finetune" else {}
    recipe = make_recipe(
        stage,
        language_model=lora,
        vision_tower=lora,
        data={"order": "sequential", "pack_tokens": 100},
        train={"global_batch_size": global_batch_size, "epochs": 2},
    )
    one = train(replace(recipe, output=str(tmp_path / "one")), quiet=True)
    results = finish(start_two(replace(recipe, output=str(tmp_path / "two"))))
    assert [code for code, _ in results] == [0, 0], results
    rows, expected = read_journal(tmp_path / "two"), read_journal(one)
    assert len(rows) == len(expected) == 2 * -(-8 // global_batch_size)
    for row, straight in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(straight["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-4)
        assert row["epoch"] == straight["epoch"]
    weights = load_file(newest(tmp_path / "two") / "trainable.safetensors")
    # AdamW divides by the size of the gradient: where that is next to nothing, rounding decides.
    torch.testing.assert_close(weights, load_file(newest(one) / "trainable.safetensors"), atol=2e-5, rtol=1e-3)


def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={"global_batch_size": 4, "epochs": 200, "save_every": 3, "log_every": 1})
    recipe = replace(recipe, output=str(tmp_path / "two"))
    processes = start_two(recipe)
    while not checkpoints(tmp_path / "two"):
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [143, 143], results
    assert "stopped after step" in results[0][1]
    assert 3 <= read_state(newest(tmp_path / "two")).step < 400
    short = replace(recipe, train=replace(recipe.train, log_every=50))
    train(short, resume=True, quiet=True)
    assert read_state(newest(tmp_path / "two")).step == 400
