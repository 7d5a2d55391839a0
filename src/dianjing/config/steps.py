"""Optimizer steps of a run, by batch, epochs and records."""

from __future__ import annotations

import math

from dianjing.config.schema import Recipe, Stage
from dianjing.language import counted, say

FEW = 100
"""In fewer steps a model hardly learns."""
AIM = 300
"""Steps that a recipe for few records is given."""
FULL_BATCH: dict[Stage, int] = {"pretrain": 256, "finetune": 128}
"""LLaVA's; more records than that make enough steps with it."""
SMALL_BATCH = 4


def steps_per_epoch(records: int, global_batch_size: int) -> int:
    """Return how many optimizer steps show each record once; the last one may be smaller."""
    return -(-records // global_batch_size)


def total_steps(recipe: Recipe, records: int) -> int:
    """Return the optimizer steps of a whole run."""
    steps = recipe.train.epochs * steps_per_epoch(records, recipe.train.global_batch_size)
    return min(steps, recipe.train.max_steps or steps)


def fitting(records: int, stage: Stage) -> tuple[int, int]:
    """Return a batch and epochs for this number of records: LLaVA's for many, for few the steps of AIM or some more."""
    batch = min(FULL_BATCH[stage], max(SMALL_BATCH, 2 ** int(math.log2(max(records / AIM, 1)))))
    return batch, math.ceil(AIM / steps_per_epoch(max(records, 1), batch))


def few_steps(recipe: Recipe, records: int) -> str:
    """Return a warning about a recipe whose run is over before it has learned, "" for any other.

    A run that train.max_steps ends early is meant to be short.
    """
    train, steps = recipe.train, total_steps(recipe, records)
    if steps >= FEW or not records or train.max_steps:
        return ""
    batch, epochs = fitting(records, recipe.stage)
    made = epochs * steps_per_epoch(records, batch)
    return say(
        "only {steps}: {records:,} records in batches of {size}, {epochs}. In fewer than {few} a model hardly learns; "
        "train.global_batch_size = {batch} and train.epochs = {more} make {made}",
        steps=counted(steps, "{number:,} optimizer step", "{number:,} optimizer steps"),
        records=records,
        size=train.global_batch_size,
        epochs=counted(train.epochs, "{number:,} epoch", "{number:,} epochs"),
        few=FEW,
        batch=batch,
        more=epochs,
        made=made,
    )
