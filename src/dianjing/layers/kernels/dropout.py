"""Kernels of dropout, drawn from a seed in both passes. `fused/ops.py` says what each computes.

A program takes FLAT numbers, and eight of them share a draw.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.launch import FLAT, flat_programs, launch

DRAWS = 65_536
"""A draw is a whole number below this."""
ROUNDS = tl.constexpr(7)
"""Of Philox, the generator: with seven it passes all known tests of randomness (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011)."""


@triton.jit
def _draws(seed, program, SIZE: tl.constexpr):
    """Return a program's draws, eight from each call of the generator."""
    draw = program * (SIZE // 8) + tl.arange(0, SIZE // 8)
    one, two, three, four = tl.randint4x(seed, draw, ROUNDS)
    words = tl.join(tl.join(one, two), tl.join(three, four))
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (SIZE,))


@triton.jit
def _dropout(x, results, seeds, number, least, up, SEEDS: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * up
    target = results + at
    for which in tl.static_range(SEEDS):
        kept = _draws(tl.load(seeds + which), program, SIZE) >= least
        tl.store(target, tl.where(kept, values, 0.0).to(results.dtype.element_ty), mask=inside)
        target += number


@triton.jit
def _add_dropout(parts, out, seeds, number, least, up, SEEDS: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    source = parts + at
    for which in tl.static_range(SEEDS):
        kept = _draws(tl.load(seeds + which), program, SIZE) >= least
        values += tl.where(kept, tl.load(source, mask=inside, other=0.0).to(tl.float32) * up, 0.0)
        source += number
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def dropout(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """See ops.dropout."""
    result = x.new_empty(len(seeds), *x.shape)
    launch(_dropout, flat_programs(x.numel()), x, result, seeds, x.numel(), *_kept(p), **_shape(seeds))
    return result


def add_dropout(out: Tensor, parts: Tensor, seeds: Tensor, p: float) -> None:
    """See ops.add_dropout."""
    number = out.numel()
    launch(_add_dropout, flat_programs(number), parts, out, seeds, number, *_kept(p), **_shape(seeds))


def _kept(p: float) -> tuple[int, float]:
    """Return the smallest draw with which a number is kept, and the factor it is multiplied by then."""
    dropped = min(round(p * DRAWS), DRAWS - 1)
    return dropped, DRAWS / (DRAWS - dropped)


def _shape(seeds: Tensor) -> dict[str, Any]:
    return {"SEEDS": len(seeds), "SIZE": FLAT}
