"""How kernels are started."""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor

FLAT = 2048
"""Numbers that a program takes of a tensor whose rows do not matter."""


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Start a kernel with this many programs; its tensors must be contiguous."""
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)), "not contiguous"
    if programs:
        kernel[(programs,)](*arguments, **settings)


def row_shape(columns: int) -> dict[str, int]:
    """Return the settings of a kernel whose program holds a whole row."""
    return {"BLOCK": triton.next_power_of_2(columns), "num_warps": 16 if columns > 4096 else 8 if columns > 1024 else 4}


def heads_shape(heads: int, size: int) -> dict[str, int]:
    """Return the settings of a kernel whose program holds all heads of a token, `size` numbers of each."""
    sides = triton.next_power_of_2(heads), triton.next_power_of_2(size)
    return {"HEADS": sides[0], "SIZE": sides[1], "num_warps": 8 if sides[0] * sides[1] > 1024 else 4}


def flat_programs(number: int) -> int:
    """Return how many programs take this many numbers, FLAT at a time."""
    return triton.cdiv(number, FLAT)
