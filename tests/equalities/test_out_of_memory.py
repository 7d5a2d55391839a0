"""A run that runs out of memory on the way ends with the weights of one that never did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dianjing.config.schema import Recipe
from dianjing.data.collate import Batch
from dianjing.errors import TrainError
from dianjing.run.checkpoint import newest
from dianjing.run.layout import checkpoints
from dianjing.train import engine as engine_module
from dianjing.train.loop import train
from tests.conftest import MakeRecipe

Refuses = Callable[[int, Batch, Any], bool]
"""(number of the pass, counted from 1; batch; model) -> whether memory runs out in it."""


def checkpointing(model: Any) -> bool:
    return bool(getattr(model.model.language_model.layers[0], "gradient_checkpointing", False))


@pytest.fixture
def run_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[Refuses], list[tuple[int, bool]]]:
    """Let passes run out of memory in their backward pass; returns sizes of all passes and whether they checkpoint."""
    plain = engine_module.forward_loss

    def set_limit(refuses: Refuses) -> list[tuple[int, bool]]:
        passes: list[tuple[int, bool]] = []

        def limited(model: Any, batch: Batch) -> Tensor:
            passes.append((batch.num_tokens, checkpointing(model)))
            loss = plain(model, batch)
            if refuses(len(passes), batch, model):
                loss.register_hook(_no_memory)
            return loss

        monkeypatch.setattr(engine_module, "forward_loss", limited)
        return passes

    return set_limit


def _no_memory(_: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def weights_after(recipe: Recipe, **changes: Any) -> dict[str, Tensor]:
    run = train(replace(recipe, **changes), quiet=True)
    return load_file(newest(run) / "trainable.safetensors")


def notes_of(run: str | Path) -> list[str]:
    rows = [json.loads(line) for line in (Path(run) / "train.jsonl").read_text().splitlines()]
    return [note for row in rows for note in row.get("notes", [])]


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Recipe:
    """Several packs a step; dropout, whose masks a second attempt must draw as the first did."""
    adapters = {"tuning": "lora", "lora_dropout": 0.3}
    train = {"epochs": 2, "log_every": 3, "save_every": 3}
    return make_recipe(
        "finetune", language_model=adapters, vision_tower=adapters, data={"pack_tokens": 90}, train=train
    )


def test_checkpointing_is_turned_on_and_the_step_taken_again(
    recipe: Recipe, run_out: Callable[[Refuses], list[tuple[int, bool]]], tmp_path: Path
) -> None:
    expected = weights_after(recipe, output=str(tmp_path / "undisturbed"))
    passes = run_out(lambda number, _, model: number > 1 and not checkpointing(model))
    found = weights_after(recipe)
    assert {on for _, on in passes[:2]} == {False}
    assert {on for _, on in passes[2:]} == {True}
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    (note,) = notes_of(recipe.output)
    assert note.startswith("step 1 ran out of GPU memory (CUDA out of memory) and is taken again, nothing is lost")
    assert note.endswith("activation checkpointing is on from here")
    assert not notes_of(tmp_path / "undisturbed")


def test_packs_are_made_smaller(
    recipe: Recipe, run_out: Callable[[Refuses], list[tuple[int, bool]]], tmp_path: Path
) -> None:
    without = replace(
        recipe,
        language_model=replace(recipe.language_model, lora_dropout=0.0),
        vision_tower=replace(recipe.vision_tower, lora_dropout=0.0),
        data=replace(recipe.data, pack_tokens=256),
    )
    expected = weights_after(without, output=str(tmp_path / "undisturbed"))
    passes = run_out(lambda _, batch, __: batch.num_tokens > 60 and len(batch.ids) > 1)
    found = weights_after(without)
    assert len({tokens for tokens, _ in passes}) > 4
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-6)
    notes = notes_of(recipe.output)
    assert [note.rpartition(": ")[2].partition(" ")[0] for note in notes] == [
        "activation",
        *["packs"] * (len(notes) - 1),
    ]
    assert len(notes) >= 2
    later = [tokens for tokens, _ in passes[len(passes) // 2 :]]
    assert max(later) < max(tokens for tokens, _ in passes)  # later steps are split before they are tried


def test_nothing_is_left_to_try(recipe: Recipe, run_out: Callable[[Refuses], list[tuple[int, bool]]]) -> None:
    passes = run_out(lambda number, *_: number > 8)
    with pytest.raises(
        TrainError, match=r"out of GPU memory \(CUDA out of memory\), with activation checkpointing"
    ) as raised:
        train(replace(recipe, train=replace(recipe.train, save_every=1)), quiet=True)
    assert "--resume goes on from them" in str(raised.value)
    assert 'language_model.quantization = "nf4"' in str(raised.value)
    assert len(passes) > 9
    assert checkpoints(Path(recipe.output))
    assert load_file(newest(Path(recipe.output)) / "trainable.safetensors")


def test_out_of_memory_elsewhere(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dianjing.train.loop.build", lambda *_, **__: _no_memory(torch.zeros(())))
    with pytest.raises(TrainError, match=r"out of GPU memory .* `dianjing plan` says what each of them saves"):
        train(recipe, quiet=True)
