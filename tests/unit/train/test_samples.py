from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.errors import DataError
from dianjing.run.checkpoint import newest
from dianjing.train.loop import train


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def recipe(make_recipe: Any, tiny_dataset: Any) -> Any:
    samples = {"sample_every": 2, "sample_path": str(tiny_dataset.path), "sample_count": 2}
    return make_recipe(train={"global_batch_size": 3, "epochs": 2, "save_every": 3, **samples})


def test_the_same_questions_before_on_the_way_and_at_the_end(recipe: Any, tmp_path: Path) -> None:
    run = train(recipe, quiet=True)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert {row["id"] for row in rows} == {"wide", "two"}
    assert rows[0]["question"] == "What colour is it?"
    assert rows[0]["reference"] == "It is red."
    page = (run / "samples.html").read_text(encoding="utf-8")
    assert all(f"step {step}" in page for step in (0, 2, 4, 6))
    assert page.count("data:image/") >= 2

    silent = train(replace(recipe, output=str(tmp_path / "silent"), train=replace(recipe.train, sample_every=0)))
    assert not (silent / "samples.jsonl").exists()
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        assert (newest(run) / name).read_bytes() == (newest(silent) / name).read_bytes(), "asking changes nothing"

    shutil.rmtree(newest(run))
    train(recipe, resume=True, quiet=True)
    assert rows_of(run) == rows


def test_held_out_records_that_cannot_be_used_stop_before_the_first_step(recipe: Any) -> None:
    recipe = replace(recipe, train=replace(recipe.train, sample_path="nowhere.json"))
    with pytest.raises(DataError, match=r"nowhere\.json"):
        train(recipe, quiet=True)
    assert not Path(recipe.output).exists()
