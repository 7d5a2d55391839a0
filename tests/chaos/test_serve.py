"""A real server, `transformers serve`, with a model of our own: its records pass `check`, and train."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dianjing.cli.main import main
from dianjing.config.schema import DataConfig
from dianjing.data.record import load_records
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import sample_distinct
from dianjing.train.loop import train
from tests.chaos.conftest import Maker
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, write_run

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
QUESTIONS = ("How many objects are there?", "Is there a circle?", "图中有几个物体？")

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; NOT checked that `transformers serve` can be asked"
)


@pytest.fixture
def model(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """Export a model that speaks of scenes and has learned nothing about pictures."""
    parts = {"language_model": {"folder": "tinyworld", "template": ""}, "vision_tower": {"folder": "tinyworld"}}
    recipe = make_recipe("pretrain", output=str(tmp_path / "blind"), **parts)
    assert main(["export", str(write_run(recipe, loaded_model(recipe))), str(tmp_path / "export")]) == 0
    return tmp_path / "export"


@pytest.fixture
def served(model: Path) -> Iterator[str]:
    """Serve the model; give the endpoint's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            assert server.poll() is None, "transformers serve ended"
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


@pytest.mark.timeout(180)
def test_records_of_a_real_server_pass_check_and_train(
    make: Maker, model: Path, served: str, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make.images.mkdir()
    for i, scene in enumerate(sample_distinct(random.Random(5), 20, "train")):
        render(scene, i).save(make.images / f"{i:02d}.png")
    asked = tmp_path / "asked.txt"
    asked.write_text("\n".join(QUESTIONS), encoding="utf-8")
    flags = ["--questions", str(asked), "--max-tokens", "60", "--held-out", "0.2"]
    arguments = ["make", str(make.images), "--out", str(make.out), "--model", str(model), "--base-url", served]
    assert main([*arguments, *flags]) == 0, capsys.readouterr().err
    assert make.statuses() == ["ok"] * 60
    held_out = load_records(str(make.out.with_name("data_held_out.json"))).records
    records = load_records(str(make.out)).records
    assert {record.images for record in [*records, *held_out]} <= {(f"{i:02d}.png",) for i in range(20)}
    assert len(records) + len(held_out) > 15
    assert all(turn.question.removeprefix("<image>\n") in QUESTIONS for record in records for turn in record.turns)
    for written in (make.out, make.out.with_name("data_held_out.json")):
        assert main(["check", str(written), "--images", str(make.images)]) == 0, capsys.readouterr()

    recipe = make_recipe("finetune", output=str(tmp_path / "run"))
    data = DataConfig(path=str(make.out), images=str(make.images), pack_tokens=256)
    train(replace(recipe, data=data))
    assert len((tmp_path / "run" / "train.jsonl").read_text().splitlines()) >= 2
