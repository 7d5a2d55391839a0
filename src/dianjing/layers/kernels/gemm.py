"""Kernels of GEMMs: the sum of a split-K product, and a product added to a matrix. See layers/gemm.py."""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.launch import FLAT, flat_programs

TILE = {"ROWS": 128, "COLUMNS": 128, "INNER": 64, "num_warps": 8, "num_stages": 3}
"""Of `addmm_out`. Two programs fit on a processor: one multiplies while the other adds."""


@triton.jit(do_not_specialize=["num_splits", "left_over"])
def _sum_splits(
    products,
    a,
    b,
    out,
    scale,
    number,
    columns,
    a_stride,
    b_stride,
    num_splits,
    left_over,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(products + at, mask=inside, other=0.0)
    for split in range(1, num_splits):
        values += tl.load(products + split * number + at, mask=inside, other=0.0)
    for row in range(left_over):
        left = tl.load(a + row * a_stride + at // columns, mask=inside, other=0.0).to(tl.float32)
        values += left * tl.load(b + row * b_stride + at % columns, mask=inside, other=0.0).to(tl.float32)
    values = values * scale
    if ADD:
        values += tl.load(out + at, mask=inside, other=0.0)
    tl.store(out + at, values, mask=inside)


@triton.jit
def _addmm_out(
    base,
    a,
    b,
    out,
    rows,
    columns,
    inner,
    base_stride,
    a_stride,
    b_stride,
    out_stride,
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
    tl.store(out + row.to(tl.int64) * out_stride + column, values.to(out.dtype.element_ty), mask=inside)


def sum_splits(products: Tensor, a: Tensor, b: Tensor, scale: float, out: Tensor | None) -> Tensor:
    """See gemm.sum_splits; a and b may be columns of wider matrices."""
    total = torch.empty_like(products[0]) if out is None else out
    sizes = total.numel(), total.shape[1], a.stride(0), b.stride(0), len(products), len(a)
    kernel: Any = _sum_splits
    kernel[(flat_programs(sizes[0]),)](products, a, b, total, scale, *sizes, ADD=out is not None, SIZE=FLAT)
    return total


def addmm_out(base: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """See gemm.addmm_out; each matrix may be columns of a wider one."""
    if base.dtype != torch.bfloat16:
        torch.addmm(base, a, b, out=out)
        return
    (rows, columns), inner = out.shape, a.shape[1]
    kernel: Any = _addmm_out
    programs = triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(columns, TILE["COLUMNS"])
    strides = (tensor.stride(0) for tensor in (base, a, b, out))
    kernel[(programs,)](base, a, b, out, rows, columns, inner, *strides, **TILE)
