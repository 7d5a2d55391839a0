"""How a step's records are cut into packs changes nothing: eight packs of one record equal one pack of eight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dianjing.config.schema import Recipe
from dianjing.data.dataset import Dataset
from dianjing.run.checkpoint import newest
from dianjing.run.journal import read_journal
from dianjing.train import step as module
from dianjing.train.loop import train

STEPS = 3


def outcome(recipe: Recipe, run: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    train(replace(recipe, output=str(run)), quiet=True)
    return read_journal(run), load_file(newest(run) / "trainable.safetensors")


@pytest.fixture(params=["pretrain", "finetune"])
def recipe(request: pytest.FixtureRequest, make_recipe: Any) -> Recipe:
    tuning = {} if request.param == "pretrain" else {"tuning": "lora"}
    return make_recipe(
        request.param,
        language_model=tuning,
        vision_tower=tuning,
        train={"global_batch_size": 8, "epochs": STEPS, "weight_decay": 0.1},
        data={"pack_tokens": 4096},
    )


def test_eight_packs_of_one_equal_one_pack_of_eight(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    backward = module.backward

    def counted(parts: Any, batches: Any, tokens: int) -> torch.Tensor:
        sizes.append(len(batches))
        return backward(parts, batches, tokens)

    monkeypatch.setattr(module, "backward", counted)
    rows, weights = outcome(recipe, tmp_path / "1x8")
    monkeypatch.setattr(Dataset, "packs", lambda self, indices: [[index] for index in indices])
    rows_of_ones, weights_of_ones = outcome(recipe, tmp_path / "8x1")
    assert sizes == [1] * STEPS + [8] * STEPS
    for row, other in zip(rows, rows_of_ones, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    # AdamW divides by the size of the gradient: where that is next to nothing, rounding decides.
    torch.testing.assert_close(weights_of_ones, weights, atol=2e-5, rtol=1e-3)


def test_a_mean_of_means_would_be_seen(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = outcome(recipe, tmp_path / "1x8")

    def mean_of_means(parts: Any, batches: Any, tokens: int) -> torch.Tensor:
        shares = [parts.engine._losses(batch) / batch.num_supervised / len(batches) for batch in batches]
        torch.stack(shares).sum().backward()
        return torch.stack(shares).detach()

    monkeypatch.setattr(module, "backward", mean_of_means)
    monkeypatch.setattr(Dataset, "packs", lambda self, indices: [[index] for index in indices])
    wrong, _ = outcome(recipe, tmp_path / "wrong")
    assert wrong[0]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-3)


def test_order_and_packs_do_not_depend_on_workers(recipe: Recipe, tmp_path: Path) -> None:
    small = replace(recipe, train=replace(recipe.train, global_batch_size=3))
    _, weights = outcome(small, tmp_path / "0")
    _, same = outcome(replace(small, data=replace(small.data, workers=2)), tmp_path / "2")
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
