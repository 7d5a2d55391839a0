"""Kernels beside matrix products: the sum of their parts, a matrix and a product.

`products.py` says what each of them computes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.heads import FLAT

TILE = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}
"""Of a sum with a product. Two programs fit on a processor: one is at its product, the other at its sum."""


@triton.jit(do_not_specialize=["number_of_parts", "left_over"])
def _sum_of_parts(
    parts,
    a,
    b,
    total,
    scale,
    number,
    columns,
    a_stride,
    b_stride,
    number_of_parts,
    left_over,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(parts + at, mask=inside, other=0.0)
    for part in range(1, number_of_parts):
        values += tl.load(parts + part * number + at, mask=inside, other=0.0)
    for row in range(left_over):
        left = tl.load(a + row * a_stride + at // columns, mask=inside, other=0.0).to(tl.float32)
        values += left * tl.load(b + row * b_stride + at % columns, mask=inside, other=0.0).to(tl.float32)
    values = values * scale
    if ADD:
        values += tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, values, mask=inside)


@triton.jit
def _sum_with_product(
    base,
    a,
    b,
    total,
    rows,
    columns,
    inner,
    base_stride,
    a_stride,
    b_stride,
    total_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    step = tl.arange(0, INNER)
    left = a + row.to(tl.int64) * a_stride + step[None, :]
    right = b + step[:, None] * b_stride + column
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, inner, INNER):
        rest = inner - begin
        one = tl.load(left, mask=(row < rows) & (step[None, :] < rest), other=0.0)
        other = tl.load(right, mask=(step[:, None] < rest) & (column < columns), other=0.0)
        sums = tl.dot(one, other, sums)
        left += INNER
        right += INNER * b_stride
    inside = (row < rows) & (column < columns)
    values = sums + tl.load(base + row.to(tl.int64) * base_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + row.to(tl.int64) * total_stride + column, values.to(total.dtype.element_ty), mask=inside)


def sum_of_parts(parts: Tensor, a: Tensor, b: Tensor, scale: float, into: Tensor | None) -> Tensor:
    """Return scale times (the sum over the first dimension + a.T @ b), where a and b have few rows; added to `into`."""
    total = torch.empty_like(parts[0]) if into is None else into
    sizes = total.numel(), total.shape[1], a.stride(0), b.stride(0), len(parts), len(a)
    kernel: Any = _sum_of_parts  # a and b may be columns of something wider
    kernel[(triton.cdiv(sizes[0], FLAT),)](parts, a, b, total, scale, *sizes, ADD=into is not None, SIZE=FLAT)
    return total


def sum_with_product(base: Tensor, a: Tensor, b: Tensor, total: Tensor) -> None:
    """Fill `total`; each tensor's rows may be parts of something wider."""
    (rows, columns), inner = total.shape, a.shape[1]
    kernel: Any = _sum_with_product
    programs = triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(columns, TILE["COLUMNS"])
    strides = (tensor.stride(0) for tensor in (base, a, b, total))
    kernel[(programs,)](base, a, b, total, rows, columns, inner, *strides, **TILE)
