"""Choice of a run's arithmetic for train.precision = "auto": by the GPU, or measured on a CPU."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from dianjing.config.schema import Recipe
from dianjing.run.checkpoint import read_state
from dianjing.train.step import over_ranks

FIELD = "train.precision"
ROWS, INNER, OUTER = 2048, 512, 1536
"""Of the matrices multiplied: a pack of tokens through the MLP of a small LLM."""
TIMES = 8
CLEARLY = 1.2
"""How many times as fast bf16 must be on a CPU to be worth its rounding."""


def settle_precision(recipe: Recipe, accelerator: Accelerator, checkpoint: Path | None) -> tuple[Recipe, str]:
    """Return the recipe with its precision settled, and a line on why; "" where nothing was chosen.

    A run that goes on keeps what it began with; in a checkpoint of an older version that may be "auto" itself.
    """
    if recipe.train.precision != "auto":
        return recipe, ""
    if checkpoint:
        chosen, why = read_state(checkpoint).recipe[FIELD], "as the run began"
        if chosen == "auto":
            return recipe, ""
    elif accelerator.device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        why = "this GPU has it" if chosen == "bf16" else "this GPU has no bf16"
    else:
        fp32, bf16 = (_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
        # All ranks must agree, and their clocks do not: the sum of their times decides.
        fp32, bf16 = over_ranks(accelerator, fp32, bf16)
        chosen = "bf16" if CLEARLY * bf16 < fp32 else "fp32"
        why = f"measured on this CPU: bf16 is {fp32 / bf16:.1f} times as fast as fp32"
    settled = replace(recipe, train=replace(recipe.train, precision=chosen))
    return settled, f"precision: {chosen} ({why}; {FIELD} chooses)"


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time of a product and its way back on this CPU: having the units does not tell."""
    tokens, weight = torch.ones(ROWS, INNER, dtype=dtype), torch.ones(INNER, OUTER, dtype=dtype)
    taken: list[float] = []
    for _ in range(TIMES):
        began = time.perf_counter()
        torch.mm(tokens @ weight, weight.T)
        taken.append(time.perf_counter() - began)
    return min(taken)
