from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dianjing.errors import CheckpointError
from dianjing.model.build import build
from dianjing.model.stage import apply_stage
from dianjing.train.optim import (
    learning_rate_factor,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rates,
    steps_of,
)


def xtuner_factor(step: int, steps: int, ratio: float) -> float:
    """mmengine's LinearLR(1e-5) to int(ratio * steps), then CosineAnnealingLR to 0, as their closed forms."""
    end = int(ratio * steps)
    if step < end:
        return 1e-5 + (1 - 1e-5) * step / (end - 1)
    return 0.5 * (1 + math.cos(math.pi * (step - end) / (steps - end)))


@pytest.mark.parametrize("steps", [67, 100, 1200, 2181])
def test_the_curve_is_xtuners_where_that_is_sound(steps: int) -> None:
    ours = [learning_rate_factor(step, steps, 0.03) for step in range(steps)]
    assert ours == pytest.approx([xtuner_factor(step, steps, 0.03) for step in range(steps)], abs=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_no_run_is_stuck_or_without_a_rate(ratio: float) -> None:
    for steps in range(1, 70):
        factors = [round(learning_rate_factor(step, steps, ratio), 12) for step in range(steps)]
        top = factors.index(1)
        assert factors[:top] == sorted(factors[:top])
        assert factors[top:] == sorted(factors[top:], reverse=True)
        assert min(factors) > 0
        assert (top > 0) == (ratio > 0 and steps >= 4), steps


def optimizer_of(make_recipe: Any) -> tuple[Any, torch.optim.AdamW]:
    recipe = make_recipe(
        "finetune",
        language_model={"tuning": "lora", "learning_rate": 2e-4},
        vision_tower={"tuning": "lora"},
        projector={"learning_rate": 0.5},
        train={"betas": (0.8, 0.9), "weight_decay": 0.1},
    )
    built = build(recipe)
    apply_stage(built.model, recipe)
    return built.model, make_optimizer(built.model, recipe)


def test_each_part_has_its_group_and_rate(make_recipe: Any) -> None:
    model, optimizer = optimizer_of(make_recipe)
    set_learning_rates(optimizer, 0.5)
    groups = {group["part"]: group for group in optimizer.param_groups}
    assert {part: group["lr"] for part, group in groups.items()} == {
        "language_model": 1e-4,
        "vision_tower": 5e-4,
        "projector": 0.25,
    }
    assert groups["projector"]["betas"] == (0.8, 0.9)
    assert groups["projector"]["weight_decay"] == 0.1
    trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
    assert {id(weight) for group in groups.values() for weight in group["params"]} == trained
    assert all("vision_tower" in name for name in groups["vision_tower"]["param_names"])


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=generator)
    set_learning_rates(optimizer, 0.1)
    optimizer.step()


def test_the_state_goes_through_a_file_exactly(make_recipe: Any, tmp_path: Path) -> None:
    model, optimizer = optimizer_of(make_recipe)
    step(model, optimizer, 0)
    save_file(optimizer_state(optimizer), tmp_path / "state.safetensors")
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step(model, optimizer, 1)
    other, fresh = optimizer_of(make_recipe)
    other.load_state_dict(weights)
    load_optimizer_state(fresh, load_file(tmp_path / "state.safetensors"))
    step(other, fresh, 1)
    for name, weight in other.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("kind", "value"),
    [("exp_avg_sq", torch.zeros(1)), ("exp_avg", torch.zeros(1)), ("step", torch.zeros(2)), ("exp_avg", None)],
)
def test_a_state_of_another_shape_is_refused(make_recipe: Any, kind: str, value: torch.Tensor | None) -> None:
    """AdamW's step would read beyond its end."""
    model, optimizer = optimizer_of(make_recipe)
    step(model, optimizer, 0)
    state = optimizer_state(optimizer)
    key = f"model.multi_modal_projector.linear_2.bias/{kind}"
    state[key] = state[key].to(torch.bfloat16) if value is None else value
    with pytest.raises(CheckpointError, match=rf"not of what trains here \({key}\)"):
        load_optimizer_state(optimizer, state)


def test_the_state_of_other_weights_is_refused(make_recipe: Any) -> None:
    model, optimizer = optimizer_of(make_recipe)
    step(model, optimizer, 0)
    state = optimizer_state(optimizer)
    lost = next(iter(state)).rpartition("/")[0]
    with pytest.raises(CheckpointError, match="not of what trains here"):
        load_optimizer_state(optimizer, {key: value for key, value in state.items() if not key.startswith(lost)})


def test_steps_that_are_counted_once_for_all() -> None:
    state = {"a/step": torch.tensor(7.0), "a/exp_avg": torch.tensor(3.0), "b/step": torch.tensor(7.0)}
    assert steps_of(state) == 7
    with pytest.raises(CheckpointError, match="from 7 to 9 steps with its parameters"):
        steps_of({**state, "b/step": torch.tensor(9.0)})
