"""(seed, epoch, step, rank) -> records: a pure function, so that a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch


def epoch_order(n: int, seed: int, epoch: int, mode: Literal["shuffle", "sequential"]) -> list[int]:
    """Return the order of n records in one epoch; "shuffle" is mmengine's DefaultSampler for this seed."""
    if mode == "sequential":
        return list(range(n))
    generator = torch.Generator().manual_seed(seed + epoch)
    return [int(index) for index in torch.randperm(n, generator=generator)]


def steps_per_epoch(n: int, global_batch_size: int) -> int:
    """Return how many optimizer steps show each of n records once; the last one may be smaller."""
    return -(-n // global_batch_size)


def step_indices(order: Sequence[int], step: int, global_batch_size: int, rank: int, world_size: int) -> list[int]:
    """Return one rank's records of a step, counted within its epoch.

    order [4, 2, 0, 3, 1], step 1, global_batch_size 3 -> rank 0 of 2: [3], rank 1 of 2: [1]
    """
    start = step * global_batch_size
    return list(order[start : start + global_batch_size][rank::world_size])


def run_indices(
    n: int,
    *,
    seed: int,
    mode: Literal["shuffle", "sequential"],
    global_batch_size: int,
    rank: int,
    world_size: int,
    first_step: int,
    last_step: int,
) -> Iterator[list[int]]:
    """Yield one rank's records of the steps first_step..last_step - 1, counted from the start of the run."""
    steps = steps_per_epoch(n, global_batch_size)
    order: list[int] = []
    for step in range(first_step, last_step):
        epoch, step_of_epoch = divmod(step, steps)
        if not order or step_of_epoch == 0:
            order = epoch_order(n, seed, epoch, mode)
        yield step_indices(order, step_of_epoch, global_batch_size, rank, world_size)
