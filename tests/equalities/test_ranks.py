"""Two processes that share each step's records end with the weights of one, however they share the model."""

from __future__ import annotations

import importlib.util
import os
import shutil
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
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.journal import read_journal
from dianjing.run.layout import checkpoints
from dianjing.train.loop import train

TIMEOUT_SECONDS = 240


TRAIN_ALL = """
import sys
from dianjing.config.load import load_recipe
from dianjing.train.loop import train
for path in sys.argv[1:]:
    train(load_recipe(path), resume=path.endswith("-resumed.toml"), quiet=True)
"""
DEEPSPEED = ["deepspeed_zero2"] if importlib.util.find_spec("deepspeed") else []


def start_ranks(*arguments: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start python with these arguments as ranks that meet over gloo."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(ranks),
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Return exit code and stderr of each; one that hangs is killed and fails the test."""
    try:
        errors = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def straight_recipe(make_recipe: Any, stage: str, size: int, run: Path) -> Recipe:
    lora = {} if stage == "pretrain" else {"tuning": "lora"}
    return make_recipe(
        stage,
        output=str(run),
        language_model=lora,
        vision_tower=lora,
        data={"order": "sequential", "pack_tokens": 100},
        train={"global_batch_size": size, "epochs": 2, "save_every": 8 // size // 2 + 1, "keep": 9},
    )


def changed(recipe: Recipe, run: Path, engine: str, begun_by: Path | None = None) -> Recipe:
    """Return the recipe with another engine and folder; `begun_by` gives the run that the first steps are from."""
    recipe = replace(recipe, output=str(run), train=replace(recipe.train, engine=engine))
    save_recipe(recipe, f"{run}.toml")
    if begun_by:
        half = checkpoints(begun_by)[0]
        shutil.copytree(half, run / "checkpoints" / half.name)
    return recipe


@pytest.mark.parametrize("engines", [["ddp", "fsdp2"], DEEPSPEED], ids=["torch", "deepspeed"])
def test_ranks_and_engines_change_nothing(make_recipe: Any, tmp_path: Path, engines: list[str]) -> None:
    """Two ranks with each engine, from the start and from one rank's checkpoint, and back: all equal one rank.

    So do two ranks whose layers are joined, as on GPUs.

    In order, batches of two are [wide | tall], [text | square], [two | small], [again | chat], so that there are
    steps in which one rank has no picture. Of seven, the first is [2 packs | 1 pack], the second [chat | nothing].
    """
    if not engines:
        pytest.skip("DeepSpeed is not installed: deepspeed_zero2 goes untested")
    two = []
    for stage, size in (("pretrain", 2), ("finetune", 7)):
        recipe = straight_recipe(make_recipe, stage, size, tmp_path / stage)
        one = train(recipe, quiet=True)
        for engine in engines:
            two.append(changed(recipe, Path(f"{one}-{engine}"), engine))
            two.append(changed(recipe, Path(f"{one}-{engine}-resumed"), engine, begun_by=one))
        # Engines that share weights compute their layers as they are.
        engine = engines[0]
        joined = replace(recipe, train=replace(recipe.train, compile="on"))
        two.append(changed(joined, Path(f"{one}-{engine}-joined"), engine))
    results = finish(start_ranks("-c", TRAIN_ALL, *(f"{recipe.output}.toml" for recipe in two)))
    assert [code for code, _ in results] == [0, 0], results
    for recipe in two:
        one = tmp_path / recipe.stage
        assert_same_run(Path(recipe.output), one)
        back = changed(recipe, Path(f"{recipe.output}-back"), "ddp", begun_by=Path(recipe.output))
        if not recipe.output.endswith("resumed"):
            assert_same_run(train(back, resume=True, quiet=True), one)


def assert_same_run(run: Path, straight: Path) -> None:
    """Compare losses step by step, and with what the runs ended."""
    expected = {row["step"]: row for row in read_journal(straight)}
    rows = read_journal(run)
    assert rows[-1]["step"] == len(expected)
    for row in rows:
        assert row["loss"] == pytest.approx(expected[row["step"]]["loss"], rel=1e-6), run
        assert row["grad_norm"] == pytest.approx(expected[row["step"]]["grad_norm"], rel=1e-4), run
        assert row["epoch"] == expected[row["step"]]["epoch"]
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        ended, expected_end = (load_file(newest(folder) / name) for folder in (run, straight))
        # AdamW divides by the size of the gradient: where that is next to nothing, rounding decides.
        torch.testing.assert_close(ended, expected_end, atol=2e-5, rtol=1e-3)


def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(make_recipe: Any, tmp_path: Path) -> None:
    recipe = make_recipe(train={"global_batch_size": 4, "epochs": 60, "save_every": 10})
    run = Path(recipe.output)
    save_recipe(recipe, tmp_path / "recipe.toml")
    processes = start_ranks("-m", "dianjing", "train", str(tmp_path / "recipe.toml"), "--quiet")
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
