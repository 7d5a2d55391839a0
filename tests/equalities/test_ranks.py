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
from dianjing.train.checkpoint import checkpoints, newest, read_state
from dianjing.train.log import read_journal
from dianjing.train.loop import train

TIMEOUT_SECONDS = 240


TRAIN_ALL = """
import sys
from dianjing.config.load import load_recipe
from dianjing.train.loop import train
for path in sys.argv[1:]:
    train(load_recipe(path), quiet=True)
"""


def start_two(*arguments: str) -> list[subprocess.Popen[str]]:
    """Start python with these arguments as two ranks that meet over gloo."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
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


def test_two_ranks_equal_one(make_recipe: Any, tmp_path: Path) -> None:
    """In order, batches of two are [wide | tall], [text | square], [two | small], [again | chat].

    So there are steps in which one rank has no picture. Of seven, the second step is [chat | nothing].
    """
    recipes = [
        make_recipe(
            stage,
            output=str(tmp_path / f"{stage}-{size}"),
            language_model=lora,
            vision_tower=lora,
            data={"order": "sequential", "pack_tokens": 100},
            train={"global_batch_size": size, "epochs": 2},
        )
        for stage, lora in (("pretrain", {}), ("finetune", {"tuning": "lora"}))
        for size in (2, 7)
    ]
    for recipe in recipes:
        save_recipe(recipe, f"{recipe.output}.toml")
    results = finish(start_two("-c", TRAIN_ALL, *(f"{recipe.output}.toml" for recipe in recipes)))
    assert [code for code, _ in results] == [0, 0], results
    for recipe in recipes:
        one = train(replace(recipe, output=f"{recipe.output}-one"), quiet=True)
        assert_same_run(Path(recipe.output), one, steps=2 * -(-8 // recipe.train.global_batch_size))


def assert_same_run(two: Path, one: Path, steps: int) -> None:
    rows, expected = read_journal(two), read_journal(one)
    assert len(rows) == len(expected) == steps
    for row, straight in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(straight["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(straight["grad_norm"], rel=1e-4)
        assert row["epoch"] == straight["epoch"]
    weights, expected_weights = (load_file(newest(run) / "trainable.safetensors") for run in (two, one))
    # AdamW divides by the size of the gradient: where that is next to nothing, rounding decides.
    torch.testing.assert_close(weights, expected_weights, atol=2e-5, rtol=1e-3)


def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={"global_batch_size": 4, "epochs": 60, "save_every": 10})
    run = Path(recipe.output)
    save_recipe(recipe, tmp_path / "recipe.toml")
    processes = start_two("-m", "dianjing", "train", str(tmp_path / "recipe.toml"), "--quiet")
    while not checkpoints(run):
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [143, 143], results
    assert "stopped after step" in results[0][1]
    assert 10 <= read_state(newest(run)).step < 120
    train(recipe, resume=True, quiet=True)
    assert read_state(newest(run)).step == 120
