"""Kernel that gathers rows. `fused/ops.py` says what it computes; a program takes one row."""

from __future__ import annotations

import math

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.launch import launch, row_shape


@triton.jit
def _gather_rows(x, rows, result, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside & (row >= 0), other=0.0)
    tl.store(result + place * columns + at, values, mask=inside)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """See ops.gather_rows."""
    result = x.new_empty(len(rows), *x.shape[1:])
    columns = math.prod(x.shape[1:])
    launch(_gather_rows, len(rows), x, rows, result, columns, **row_shape(columns))
    return result
