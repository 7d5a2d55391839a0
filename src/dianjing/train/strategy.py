"""The choices of a run that follow from its recipe and its machine alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from accelerate import Accelerator

from dianjing.config.schema import SHARDS_WEIGHTS, Recipe

MOST_WORKERS = 16
"""Processes that make packs for one rank, when the recipe leaves it open."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How a run uses its machine; none of it changes what is learned."""

    whole: bool
    """Each rank holds all weights; else the model is loaded on the CPU, and each GPU gets its shards."""
    compiled: bool
    """Layers are fused or compiled."""
    cuda_graphs: bool
    """The vision tower may become a CUDA graph, which is proved with one process alone."""
    workers: int
    """Processes that make this rank's packs."""
    pinned: bool
    """Packs are put where a GPU reads them by itself."""


def strategy_of(recipe: Recipe, accelerator: Accelerator) -> Strategy:
    """Return how a recipe is run on this machine."""
    on_gpu = accelerator.device.type == "cuda"
    whole = recipe.train.engine not in SHARDS_WEIGHTS
    return Strategy(
        whole=whole,
        compiled=on_gpu and whole if recipe.train.compile == "auto" else recipe.train.compile == "on",
        cuda_graphs=accelerator.num_processes == 1 and recipe.train.engine == "ddp",
        workers=recipe.data.workers if recipe.data.workers >= 0 else _workers(accelerator) if on_gpu else 0,
        pinned=on_gpu,
    )


def _workers(accelerator: Accelerator) -> int:
    """Return this rank's share of the cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or accelerator.num_processes
    return min(len(os.sched_getaffinity(0)) // ranks_here, MOST_WORKERS)
