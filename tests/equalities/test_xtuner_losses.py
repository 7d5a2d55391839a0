"""Both stages train as XTuner 0.1.23 did: its logged loss, gradient norm and learning rate of all 80 steps.

Its data set is train_unique.json ten times over: pictures of RGB, grey and RGBA, and records without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.load import load_recipe
from dianjing.formats.source import open_foreign
from dianjing.importing.run import ImportOptions, import_run
from dianjing.train.loop import train
from tests.xtuner import IMAGES, XTUNER

TINY = XTUNER / "tiny"
LOGGED: dict[str, dict[str, list[float]]] = json.loads((TINY / "logged.json").read_text(encoding="utf-8"))


def losses_of(tmp_path: Path, stage: str, start: str) -> list[dict[str, Any]]:
    """Import a state of XTuner's run, train on to its end, and return what was logged of each step."""
    config, data = tmp_path / "config.py", tmp_path / "train.json"
    config.write_text(open_foreign(TINY / f"{stage}_iter_10.pth").config, encoding="utf-8")
    records = json.loads((TINY / "train_unique.json").read_text(encoding="utf-8"))
    data.write_text(json.dumps(records * 10), encoding="utf-8")
    options = ImportOptions(
        config=config,
        llm=str(TINY / "tiny_internlm2"),
        vision_tower=str(TINY / "tiny_clip"),
        data=str(data),
        images=str(IMAGES),
    )
    import_run(TINY / f"{stage}_{start}", tmp_path / "run", options)
    run = train(load_recipe(tmp_path / "run" / "recipe.toml", {"train.log_every": 1}), resume=True, quiet=True)
    return [json.loads(line) for line in (run / "train.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("start", "first"), [("init.safetensors", 1), ("iter_10.pth", 11)])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_step_is_xtuners(tmp_path: Path, stage: str, start: str, first: int) -> None:
    rows, logged = losses_of(tmp_path, stage, start), LOGGED[stage]
    assert [row["step"] for row in rows] == list(range(first, 81))
    assert [row["loss"] for row in rows] == pytest.approx(logged["loss"][first - 1 :], abs=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(logged["grad_norm"][first - 1 :], abs=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx(logged["lr"][first - 1 :], abs=1e-9)
