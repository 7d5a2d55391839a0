"""train.precision = "auto": measured when a run begins, written down, and kept when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dianjing.config.load import load_recipe
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.journal import read_journal
from dianjing.run.layout import MANIFEST, RECIPE, STATE
from dianjing.train import precision
from dianjing.train.loop import train
from tests.conftest import MakeRecipe
from tests.llm_families import FAMILIES, write_family


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a setter of how many times as fast as in fp32 a layer is in bf16 on this machine."""

    def be(times: float) -> None:
        monkeypatch.setattr(precision, "layer_seconds", lambda _, dtype: 1.0 if dtype == torch.float32 else 1 / times)

    return be


def of(run: Path) -> str:
    return load_recipe(run / RECIPE).train.precision


@pytest.mark.parametrize(("times", "expected"), [(3.0, "bf16"), (1.1, "fp32"), (0.2, "fp32")])
def test_what_is_clearly_faster_is_chosen_and_said(
    make_recipe: MakeRecipe,
    measured: Callable[[float], None],
    capsys: pytest.CaptureFixture[str],
    times: float,
    expected: str,
) -> None:
    measured(times)
    recipe = make_recipe(train={"precision": "auto", "max_steps": 1, "compile": "off"})
    run = train(recipe)
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        f"precision: {expected} (measured on this CPU: a layer of the LLM takes 1 s in fp32, {1 / times:.2g} s in"
        in shown
    )
    assert of(run) == read_state(newest(run)).recipe["train.precision"] == expected


@pytest.mark.parametrize("family", [*FAMILIES, "internlm2"])
def test_a_layer_of_each_family_is_measured(family: str, tmp_path: Path) -> None:
    write_family(tmp_path, family)
    before = torch.random.get_rng_state()
    assert precision.layer_seconds(tmp_path, torch.bfloat16) > 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_named_precision_is_not_measured(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "layer_seconds")
    assert of(train(make_recipe(train={"max_steps": 1}), quiet=True)) == "fp32"


def test_a_run_goes_on_as_it_began_wherever_it_is(
    make_recipe: MakeRecipe, measured: Callable[[float], None], tmp_path: Path
) -> None:
    settings: Any = {"train": {"precision": "auto", "epochs": 2, "save_every": 2, "keep": 5}}
    measured(3.0)
    whole = train(make_recipe(output=str(tmp_path / "whole"), **settings), quiet=True)
    broken = train(make_recipe(output=str(tmp_path / "broken"), **settings), quiet=True)
    newest(broken).rename(tmp_path / "away")
    measured(0.2)
    train(make_recipe(output=str(broken), **settings), resume=True, quiet=True)
    assert of(broken) == "bf16"
    assert [row["loss"] for row in read_journal(broken)][-2:] == [row["loss"] for row in read_journal(whole)][-2:]


def test_a_checkpoint_of_an_older_version_goes_on_in_fp32(
    make_recipe: MakeRecipe, measured: Callable[[float], None]
) -> None:
    """It says "auto", which was fp32 on a CPU."""
    measured(0.2)
    recipe = make_recipe(train={"precision": "auto", "epochs": 2, "save_every": 2, "keep": 5})
    run = train(recipe, quiet=True)
    losses = [row["loss"] for row in read_journal(run)]
    newest(run).rename(run.parent / "away")
    state = newest(run) / STATE
    older = state.read_text(encoding="utf-8").replace('"train.precision": "fp32"', '"train.precision": "auto"')
    write_state(state, older)
    measured(3.0)
    train(recipe, resume=True, quiet=True)
    assert [row["loss"] for row in read_journal(run)][-2:] == losses[-2:]


def write_state(state: Path, text: str) -> None:
    """Write a state, and its sum into the manifest next to it."""
    state.write_text(text, encoding="utf-8")
    manifest = json.loads((state.parent / MANIFEST).read_text(encoding="utf-8"))
    content = state.read_bytes()
    manifest["files"][state.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (state.parent / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
