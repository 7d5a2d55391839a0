"""Choice of a run's arithmetic for train.precision = "auto": by the GPU, or measured on a CPU."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import MODEL_MAPPING

from dianjing.config.schema import Recipe
from dianjing.model.folders import resolve
from dianjing.model.language import empty_language_model
from dianjing.run.checkpoint import read_state
from dianjing.train.step import over_ranks

FIELD = "train.precision"
TOKENS = 256
"""Of the pack that is measured."""
TIMES = 4
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
        folder = resolve(recipe.language_model.folder, "language_model")
        fp32, bf16 = (layer_seconds(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
        # All ranks must agree, and their clocks do not: the sum of their times decides.
        fp32, bf16 = over_ranks(accelerator, fp32, bf16)
        chosen = "bf16" if CLEARLY * bf16 < fp32 else "fp32"
        why = f"measured on this CPU: a layer of the LLM takes {fp32:.2g} s in fp32, {bf16:.2g} s in bf16"
    settled = replace(recipe, train=replace(recipe.train, precision=chosen))
    return settled, f"precision: {chosen} ({why}; {FIELD} chooses)"


def layer_seconds(folder: Path, dtype: torch.dtype) -> float:
    """Return the least time of a forward and backward pass of one layer of the LLM in a folder, on this CPU."""
    config = empty_language_model(folder, dtype).config
    config.num_hidden_layers = 1
    config.vocab_size, config.pad_token_id = 8, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        layer: Any = MODEL_MAPPING[type(config)]
        layer = layer._from_config(config, dtype=dtype)
    tokens = torch.ones(1, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    taken: list[float] = []
    for _ in range(TIMES):
        began = time.perf_counter()
        layer(inputs_embeds=tokens, use_cache=False).last_hidden_state.sum().backward()
        taken.append(time.perf_counter() - began)
    return min(taken)
