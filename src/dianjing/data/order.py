"""(seed, epoch, step, rank) -> records: a pure function, so that a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dianjing.config.schema import Order
from dianjing.config.steps import steps_per_epoch

MOST_BATCHES = 50
"""In one group of the order by length."""


def epoch_order(
    n: int, seed: int, epoch: int, mode: Order, *, lengths: Sequence[int] = (), global_batch_size: int = 1
) -> list[int]:
    """Return the order of n records in one epoch.

    "shuffle" is mmengine's DefaultSampler for this seed, "length_grouped" XTuner's LengthGroupedSampler: `lengths`
    are then the records' tokens, a picture counted as one, negative for those without pictures.
    """
    if mode == "sequential":
        return list(range(n))
    generator = torch.Generator().manual_seed(seed + epoch)
    if mode == "shuffle":
        return _permutation(n, generator)
    assert len(lengths) == n, "the order by length needs the lengths"
    return _length_grouped(lengths, global_batch_size, generator)


def _length_grouped(lengths: Sequence[int], batch: int, generator: torch.Generator) -> list[int]:
    """Return an order in which neighbours are of similar length, and of one modality but for the end.

    Random groups of some batches, each sorted from long to short; the groups shuffled; the longest record first, so
    that too little memory shows at once.
    """
    size = batch * max(min(len(lengths) // (batch * 4), MOST_BATCHES), 1)
    seeing = [index for index, length in enumerate(lengths) if length > 0]
    blind = [index for index, length in enumerate(lengths) if length <= 0]
    if seeing and blind:
        seeing_groups = _groups(seeing, [lengths[index] for index in seeing], size, generator)
        blind_groups = _groups(blind, [-lengths[index] for index in blind], size, generator)
        whole = seeing_groups[:-1] + blind_groups[:-1]
        groups = [whole[number] for number in _permutation(len(whole), generator)]
        rest = seeing_groups[-1] + blind_groups[-1]
        groups.append(sorted(rest, key=lambda index: abs(lengths[index]), reverse=True))
    else:  # text alone is sorted by its negative lengths, so from short to long: XTuner's way
        groups = _groups(range(len(lengths)), lengths, size, generator)
    longest = max(range(len(groups)), key=lambda number: abs(lengths[groups[number][0]]))
    groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
    return [index for group in groups for index in group]


def _groups(indices: Sequence[int], lengths: Sequence[int], size: int, generator: torch.Generator) -> list[list[int]]:
    """Return `indices` in random groups of `size`, each by its length from large to small."""
    order = _permutation(len(indices), generator)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [[indices[i] for i in sorted(group, key=lambda i: lengths[i], reverse=True)] for group in groups]


def _permutation(n: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=generator).numpy().tolist()


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
    mode: Order,
    lengths: Sequence[int] = (),
    global_batch_size: int,
    rank: int,
    world_size: int,
    steps: range,
) -> Iterator[list[int]]:
    """Yield one rank's records of each step; `steps` are counted from the start of the run."""
    in_epoch = steps_per_epoch(n, global_batch_size)
    order: list[int] = []
    for step in steps:
        epoch, step_of_epoch = divmod(step, in_epoch)
        if not order or step_of_epoch == 0:
            order = epoch_order(n, seed, epoch, mode, lengths=lengths, global_batch_size=global_batch_size)
        yield step_indices(order, step_of_epoch, global_batch_size, rank, world_size)
