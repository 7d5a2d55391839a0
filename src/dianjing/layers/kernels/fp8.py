"""Kernels that put matrices in FP8. `fused/ops.py` says what each computes; a program takes one row."""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.fp8 import FP8, Fp8Rows
from dianjing.layers.kernels.launch import launch, row_shape

FP8_MAX = tl.constexpr(448.0)
"""Largest number of FP8 (e4m3)."""
TINY = tl.constexpr(1e-12)
"""Smallest scale of a row, times FP8_MAX: rows of zeros stay zeros."""
TILE = 64
"""Side of the squares in which a matrix is transposed."""


@triton.jit
def store_fp8_row(values, inside, fp8, at_row, scale, row):
    """Write a row in FP8, its largest number as FP8_MAX, and its scale."""
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), TINY)
    tl.store(scale + row, largest / FP8_MAX)
    tl.store(fp8 + at_row, to_fp8(values, largest, fp8), mask=inside)


@triton.jit
def to_fp8(values, largest, fp8):
    """Return numbers in FP8, for a scale of largest / FP8_MAX."""
    # Multiplied: dividing each number takes longer. Conversion saturates at FP8_MAX.
    return (values * (FP8_MAX / largest)).to(fp8.dtype.element_ty)


@triton.jit
def _quantize(
    x,
    taken,
    column_scale,
    rows,
    fp8,
    scale,
    columns,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(taken + row).to(tl.int64) if GATHER else row
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + source * columns + at, mask=inside & (source >= 0), other=0.0).to(tl.float32)
    if KEEP:
        tl.store(rows + row * columns + at, values.to(rows.dtype.element_ty), mask=inside)
    if SCALED:
        values = values * tl.load(column_scale + at, mask=inside, other=0.0)
    store_fp8_row(values, inside, fp8, row * columns + at, scale, row)


@triton.jit
def _transpose(matrix, transposed, rows, columns, SIDE: tl.constexpr):
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(matrix + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(transposed + column[:, None].to(tl.int64) * rows + row[None, :], tl.trans(square), mask=inside)


def empty_fp8(rows: int, columns: int, device: torch.device) -> Fp8Rows:
    """Return memory for a matrix in FP8."""
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    return Fp8Rows(torch.empty(rows, columns, dtype=FP8, device=device), scale)


def quantize_rows(x: Tensor, column_scale: Tensor | None = None) -> Fp8Rows:
    """See ops.quantize_rows."""
    fp8 = empty_fp8(len(x), x.shape[1], x.device)
    _launch_quantize(x, None, column_scale, None, fp8)
    return fp8


def gather_and_quantize(x: Tensor, taken: Tensor | None, *, keep: bool) -> tuple[Tensor | None, Fp8Rows]:
    """See ops.gather_and_quantize."""
    number = len(x) if taken is None else len(taken)
    rows = x.new_empty(number, x.shape[1]) if keep and taken is not None else None
    fp8 = empty_fp8(number, x.shape[1], x.device)
    _launch_quantize(x, taken, None, rows, fp8)
    return x if keep and taken is None else rows, fp8


def _launch_quantize(
    x: Tensor, taken: Tensor | None, column_scale: Tensor | None, rows: Tensor | None, fp8: Fp8Rows
) -> None:
    flags = {"GATHER": taken is not None, "SCALED": column_scale is not None, "KEEP": rows is not None}
    columns = x.shape[1]
    launch(_quantize, len(fp8.rows), x, taken, column_scale, rows, *fp8, columns, **flags, **row_shape(columns))


def transpose_fp8(matrix: Tensor) -> Tensor:
    """See ops.transpose_fp8."""
    source = matrix.view(torch.uint8)
    rows, columns = matrix.shape
    transposed = source.new_empty(columns, rows)
    kernel: Any = _transpose
    kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](source, transposed, rows, columns, SIDE=TILE)
    return transposed.view(FP8).T
