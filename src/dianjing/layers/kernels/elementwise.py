"""Kernels of joined layers that work row by row: norms, gates, and what is put in FP8.

`passes.py` says what each of them computes. A program takes one row, of a token or of a patch, and holds all of it.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LARGEST = tl.constexpr(448.0)
"""Largest number of FP8 (e4m3)."""
TINY = tl.constexpr(1e-12)
"""Smallest scale of a row, times LARGEST: rows of zeros stay zeros."""
TILE = 64
"""Side of the squares in which a matrix is turned."""


@triton.jit
def _store_eight_bits(values, inside, eight, at_row, scale, row):
    """Write a row in FP8, its largest number as LARGEST, and its scale."""
    largest = tl.maximum(tl.max(tl.abs(values), axis=0), TINY)
    tl.store(scale + row, largest / LARGEST)
    tl.store(eight + at_row, eight_bits(values, largest, eight), mask=inside)


@triton.jit
def eight_bits(values, largest, eight):
    """Return numbers in FP8, for a scale of largest / LARGEST."""
    # Multiplied: a division of each number takes longer. What is rounded past LARGEST becomes it.
    return (values * (LARGEST / largest)).to(eight.dtype.element_ty)


@triton.jit
def _norm(
    x,
    y,
    weight,
    bias,
    total,
    rows,
    eight,
    scale,
    columns,
    wide,
    left,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    KEEP: tl.constexpr,
    EIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    at_row = row * columns + at
    values = tl.load(x + at_row, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(y + at_row, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + at_row, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTRE:
        values = tl.where(inside, values - tl.sum(values, axis=0) / columns, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    values = values * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        values += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(rows + row * wide + left + at, values.to(rows.dtype.element_ty), mask=inside)
    if EIGHT:
        _store_eight_bits(values, inside, eight, at_row, scale, row)


@triton.jit
def _norm_backward(
    gradient,
    x,
    weight,
    beside,
    to_x,
    column_scale,
    eight,
    scale,
    columns,
    eps,
    BLOCK: tl.constexpr,
    CENTRE: tl.constexpr,
    BESIDE: tl.constexpr,
    EIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    at_row = row * columns + at
    values = tl.load(x + at_row, mask=inside, other=0.0).to(tl.float32)
    if CENTRE:
        values = tl.where(inside, values - tl.sum(values, axis=0) / columns, 0.0)
    steep = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    values = values * steep
    arriving = tl.load(gradient + at_row, mask=inside, other=0.0).to(tl.float32)
    arriving = arriving * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    leaving = arriving - values * (tl.sum(arriving * values, axis=0) / columns)
    if CENTRE:
        leaving = leaving - tl.sum(arriving, axis=0) / columns
    leaving = leaving * steep
    if BESIDE:
        leaving += tl.load(beside + at_row, mask=inside, other=0.0).to(tl.float32)
    leaving = leaving.to(to_x.dtype.element_ty)
    tl.store(to_x + at_row, leaving, mask=inside)
    if EIGHT:
        scaled = leaving.to(tl.float32) * tl.load(column_scale + at, mask=inside, other=0.0)
        _store_eight_bits(scaled, inside, eight, at_row, scale, row)


@triton.jit
def _gated(gate_up, rows, eight, scale, columns, BLOCK: tl.constexpr, KEEP: tl.constexpr, EIGHT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(gate_up + 2 * row * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * columns + at, mask=inside, other=0.0).to(tl.float32)
    values = gate * tl.sigmoid(gate) * up
    if KEEP:
        tl.store(rows + row * columns + at, values.to(rows.dtype.element_ty), mask=inside)
    if EIGHT:
        _store_eight_bits(values, inside, eight, row * columns + at, scale, row)


@triton.jit
def _gated_backward(
    gradient,
    gate_up,
    column_scale,
    to_gate_up,
    eight,
    scale,
    rows,
    columns,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    EIGHT: tl.constexpr,
    AGAIN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    at_gate = 2 * row * columns + at
    arriving = tl.load(gradient + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    opened = gate * share
    if AGAIN:
        tl.store(rows + row * columns + at, (opened * up).to(rows.dtype.element_ty), mask=inside)
    to_up = arriving * opened
    to_gate = arriving * up * share * (1.0 + gate * (1.0 - share))
    if KEEP:
        tl.store(to_gate_up + at_gate, to_gate.to(to_gate_up.dtype.element_ty), mask=inside)
        tl.store(to_gate_up + at_gate + columns, to_up.to(to_gate_up.dtype.element_ty), mask=inside)
    if EIGHT:
        to_gate = to_gate * tl.load(column_scale + at, mask=inside, other=0.0)
        to_up = to_up * tl.load(column_scale + columns + at, mask=inside, other=0.0)
        largest = tl.maximum(tl.max(tl.maximum(tl.abs(to_gate), tl.abs(to_up)), axis=0), TINY)
        tl.store(scale + row, largest / LARGEST)
        tl.store(eight + at_gate, eight_bits(to_gate, largest, eight), mask=inside)
        tl.store(eight + at_gate + columns, eight_bits(to_up, largest, eight), mask=inside)


@triton.jit
def _quantize(
    x,
    taken,
    column_scale,
    rows,
    eight,
    scale,
    columns,
    BLOCK: tl.constexpr,
    MOVED: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(taken + row).to(tl.int64) if MOVED else row
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + source * columns + at, mask=inside & (source >= 0), other=0.0).to(tl.float32)
    if KEEP:
        tl.store(rows + row * columns + at, values.to(rows.dtype.element_ty), mask=inside)
    if SCALED:
        values = values * tl.load(column_scale + at, mask=inside, other=0.0)
    _store_eight_bits(values, inside, eight, row * columns + at, scale, row)


@triton.jit
def _spread(x, rows, result, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + row * columns + at, mask=inside & (row >= 0), other=0.0)
    tl.store(result + place * columns + at, values, mask=inside)


@triton.jit
def _turn(matrix, turned, rows, columns, SIDE: tl.constexpr):
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    square = tl.load(matrix + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(turned + column[:, None].to(tl.int64) * rows + row[None, :], tl.trans(square), mask=inside)


def norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    wide: tuple[Tensor, int, int] | None,
    eight: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill `total`, the rows in `wide` (passes.Wide) and `eight`."""
    flags = {"ADD": y is not None, "CENTRE": bias is not None, "KEEP": wide is not None, "EIGHT": eight is not None}
    whole, left, _ = wide or (x, 0, 0)
    sizes = x.shape[1], whole.shape[1], left
    launch(
        _norm, len(x), x, y, weight, bias, total, whole, *(eight or (x, x)), *sizes, eps, **flags, **row_shape(sizes[0])
    )


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    centre: bool,
    beside: Tensor | None,
    to_x: Tensor,
    column_scale: Tensor | None,
    eight: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill `to_x` and `eight`."""
    flags = {"CENTRE": centre, "BESIDE": beside is not None, "EIGHT": eight is not None}
    pair = eight or (x, x)
    arguments = gradient, x, weight, beside, to_x, column_scale, *pair, x.shape[1], eps
    launch(_norm_backward, len(x), *arguments, **flags, **row_shape(x.shape[1]))


def gated(gate_up: Tensor, rows: Tensor | None, eight: tuple[Tensor, Tensor] | None) -> None:
    """Fill `rows` and `eight`."""
    columns = gate_up.shape[1] // 2
    flags = {"KEEP": rows is not None, "EIGHT": eight is not None}
    launch(_gated, len(gate_up), gate_up, rows, *(eight or (gate_up, gate_up)), columns, **flags, **row_shape(columns))


def gated_backward(
    gradient: Tensor,
    gate_up: Tensor,
    column_scale: Tensor | None,
    to_gate_up: Tensor | None,
    eight: tuple[Tensor, Tensor] | None,
    rows: Tensor | None,
) -> None:
    """Fill `to_gate_up`, which may be `gate_up`, `eight`, and `rows`, which may be `gradient`."""
    columns = gate_up.shape[1] // 2
    flags = {"KEEP": to_gate_up is not None, "EIGHT": eight is not None, "AGAIN": rows is not None}
    pair = eight or (gate_up, gate_up)
    arguments = gradient, gate_up, column_scale, to_gate_up, *pair, rows, columns
    shape = row_shape(columns)
    if flags["KEEP"] and flags["EIGHT"] and columns > 4096:
        shape["num_warps"] = 32  # what it holds of a row would not fit in the registers of fewer
    elif flags["EIGHT"] and shape["BLOCK"] == 8192:
        shape |= {"num_warps": 32, "maxnreg": 32}  # two programs at a time: one reads while the other writes
    launch(_gated_backward, len(gate_up), *arguments, **flags, **shape)


def quantize(
    x: Tensor, taken: Tensor | None, column_scale: Tensor | None, rows: Tensor | None, eight: tuple[Tensor, Tensor]
) -> None:
    """Fill `rows` and `eight`."""
    flags = {"MOVED": taken is not None, "SCALED": column_scale is not None, "KEEP": rows is not None}
    columns = x.shape[1]
    launch(_quantize, len(eight[0]), x, taken, column_scale, rows, *eight, columns, **flags, **row_shape(columns))


def spread(x: Tensor, rows: Tensor, result: Tensor) -> None:
    """Fill `result`."""
    launch(_spread, len(rows), x, rows, result, x.shape[1], **row_shape(x.shape[1]))


def turn(matrix: Tensor, turned: Tensor) -> None:
    """Fill `turned` with the transpose of a matrix."""
    rows, columns = matrix.shape
    kernel: Any = _turn
    kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](matrix, turned, rows, columns, SIDE=TILE)


def launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    """Run a kernel with so many programs; its tensors lie row by row."""
    assert all(argument.is_contiguous() for argument in arguments if isinstance(argument, Tensor)), "rows apart"
    if programs:
        kernel[(programs,)](*arguments, **settings)


def row_shape(columns: int) -> dict[str, int]:
    """Return how a program that holds a row is laid out."""
    return {"BLOCK": triton.next_power_of_2(columns), "num_warps": 16 if columns > 4096 else 8 if columns > 1024 else 4}
