"""AdamW with its groups of parameters; learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.errors import CheckpointError
from dianjing.model.stage import PARTS, learning_rate, part_of

WARMUP_START = 1e-5
"""Factor of the first warm-up step (XTuner's LinearLR)."""
SHORTEST_WARMUP = 2
"""Steps: the first at WARMUP_START, the second at the full rate."""
SHORTEST_SCHEDULE = 4
"""Shorter runs have no warm-up: it would be most of the run."""


def make_optimizer(model: LlavaForConditionalGeneration, recipe: Recipe) -> AdamW:
    """Return AdamW over all that trains in the model, one group a part."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {
            "part": part,
            "params": [(name, weight) for name, weight in trained if part_of(name) == part],
            "full_rate": learning_rate(recipe, part),
        }
        for part in PARTS
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        betas=recipe.train.betas,
        weight_decay=recipe.train.weight_decay,
        fused=True,
    )


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return what the learning rates are multiplied by at a step counted from 0.

    XTuner's curve: linear over the first int(warmup_ratio * total_steps) steps, then a cosine to 0. Its warm-up
    of one step would never end, and becomes one of two.
    """
    warmup = warmup_steps(total_steps, warmup_ratio)
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / (warmup - 1)
    return (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Return the steps in which the learning rate rises."""
    warmup = int(warmup_ratio * total_steps)
    if warmup_ratio > 0:
        warmup = max(warmup, SHORTEST_WARMUP) if total_steps >= SHORTEST_SCHEDULE else 0
    return warmup


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of each group to its full rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * factor


def _beside(value: Tensor, weight: Tensor) -> Tensor:
    return value.to(weight.device)


def optimizer_state(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer state of each parameter: "<parameter>/exp_avg" and so on."""
    return {
        f"{name}/{key}": value
        for group in optimizer.param_groups
        for name, weight in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[weight].items()
    }


def load_optimizer_state(
    optimizer: Optimizer, state: Mapping[str, Tensor], place: Callable[[Tensor, Tensor], Tensor] = _beside
) -> None:
    """Put back what `optimizer_state` returned; `place` brings a value to where its parameter is.

    Raises:
        CheckpointError: it is of other parameters, or of other shapes.
    """
    weights = {
        name: weight
        for group in optimizer.param_groups
        for name, weight in zip(group["param_names"], group["params"], strict=True)
    }
    require_state_of(weights, state)
    for key, value in state.items():
        name, _, kind = key.rpartition("/")
        optimizer.state[weights[name]][kind] = place(value, weights[name])


def require_state_of(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse what is not AdamW's state of these parameters: its step would read beyond what is too short.

    Raises:
        CheckpointError: one that differs is named.
    """
    expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for name, weight in weights.items():
        expected |= {f"{name}/{kind}": (weight.shape, weight.dtype) for kind in ("exp_avg", "exp_avg_sq")}
        expected[f"{name}/step"] = (torch.Size(), torch.float32)
    found = {key: (value.shape, value.dtype) for key, value in state.items()}
    if other := [key for key in {**expected, **found} if found.get(key) != expected.get(key)]:
        raise CheckpointError(f"the optimizer's state is not of what trains here ({min(other)}); start a new run")


def steps_of(state: Mapping[str, Tensor]) -> float:
    """Return how many steps AdamW has taken, for an optimizer that counts them once for all parameters.

    Raises:
        CheckpointError: they have not all taken as many.
    """
    counts = {value.item() for key, value in state.items() if key.endswith("/step")}
    if len(counts) > 1:
        raise CheckpointError(
            f"the optimizer has taken from {min(counts):.0f} to {max(counts):.0f} steps with its parameters; DeepSpeed "
            "counts once for all of them: go on with --engine ddp or fsdp2"
        )
    return counts.pop()
