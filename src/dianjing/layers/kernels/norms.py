"""Kernels of norms: RMSNorm and LayerNorm of rows, and RMSNorm of each head of queries and keys (QK-norm).

`fused/ops.py` says what each computes. A program takes one row, or all heads of one token.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.fp8 import Fp8Rows
from dianjing.layers.fused.ops import Augmented, Heads, NormOutput
from dianjing.layers.kernels.fp8 import empty_fp8, store_fp8_row
from dianjing.layers.kernels.launch import heads_shape, launch, row_shape


@triton.jit
def _norm(
    x,
    y,
    weight,
    bias,
    total,
    rows,
    fp8,
    scale,
    columns,
    stride,
    offset,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    CENTER: tl.constexpr,
    KEEP: tl.constexpr,
    FP8: tl.constexpr,
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
    if CENTER:
        values = tl.where(inside, values - tl.sum(values, axis=0) / columns, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    values = values * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        values += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(rows + row * stride + offset + at, values.to(rows.dtype.element_ty), mask=inside)
    if FP8:
        store_fp8_row(values, inside, fp8, at_row, scale, row)


@triton.jit
def _norm_backward(
    dY,
    x,
    weight,
    residual,
    dX,
    column_scale,
    fp8,
    scale,
    columns,
    eps,
    BLOCK: tl.constexpr,
    CENTER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    at_row = row * columns + at
    values = tl.load(x + at_row, mask=inside, other=0.0).to(tl.float32)
    if CENTER:
        values = tl.where(inside, values - tl.sum(values, axis=0) / columns, 0.0)
    rstd = tl.rsqrt(tl.sum(values * values, axis=0) / columns + eps)
    values = values * rstd
    dy = tl.load(dY + at_row, mask=inside, other=0.0).to(tl.float32)
    dy = dy * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    dx = dy - values * (tl.sum(dy * values, axis=0) / columns)
    if CENTER:
        dx = dx - tl.sum(dy, axis=0) / columns
    dx = dx * rstd
    if RESIDUAL:
        dx += tl.load(residual + at_row, mask=inside, other=0.0).to(tl.float32)
    dx = dx.to(dX.dtype.element_ty)
    tl.store(dX + at_row, dx, mask=inside)
    if FP8:
        scaled = dx.to(tl.float32) * tl.load(column_scale + at, mask=inside, other=0.0)
        store_fp8_row(scaled, inside, fp8, at_row, scale, row)


@triton.jit
def _qk_norm(
    qkv,
    q_weight,
    k_weight,
    result,
    heads,
    kv_heads,
    size,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < size)
    at_head = token * number * size + head * size + at
    values = tl.load(qkv + at_head, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=1)[:, None] / size + eps)
    of_q = tl.load(q_weight + at, mask=at < size, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + at, mask=at < size, other=0.0).to(tl.float32)
    normed = values * rstd * tl.where(head < heads, of_q, of_k)
    values = tl.where(head < heads + kv_heads, normed, values)
    tl.store(result + at_head, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_backward(
    dY,
    qkv,
    q_weight,
    k_weight,
    dX,
    heads,
    kv_heads,
    size,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < size)
    at_head = token * number * size + head * size + at
    values = tl.load(qkv + at_head, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=1)[:, None] / size + eps)
    values = values * rstd
    dy = tl.load(dY + at_head, mask=inside, other=0.0).to(tl.float32)
    of_q = tl.load(q_weight + at, mask=at < size, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + at, mask=at < size, other=0.0).to(tl.float32)
    scaled = dy * tl.where(head < heads, of_q, of_k)
    dx = (scaled - values * (tl.sum(scaled * values, axis=1)[:, None] / size)) * rstd
    dx = tl.where(head < heads + kv_heads, dx, dy)
    tl.store(dX + at_head, dx.to(dX.dtype.element_ty), mask=inside)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    y: Tensor | None = None,
    keep: bool = True,
    augmented: Augmented | None = None,
    fp8: bool = False,
) -> NormOutput:
    """See ops.norm."""
    columns = x.shape[1]
    total, in_fp8 = None if y is None else torch.empty_like(x), empty_fp8(len(x), x.shape[1], x.device) if fp8 else None
    if keep and augmented is None:
        augmented = Augmented(torch.empty_like(x), 0, columns)
    matrix, offset, _ = augmented or (x, 0, 0)
    flags = {"ADD": y is not None, "CENTER": bias is not None, "KEEP": augmented is not None, "FP8": fp8}
    arguments = x, y, weight, bias, total, matrix, *(in_fp8 or (x, x)), columns, matrix.shape[1], offset, eps
    launch(_norm, len(x), *arguments, **flags, **row_shape(columns))
    return NormOutput(total, None if augmented is None else augmented.X, in_fp8)


def norm_backward(
    dY: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    center: bool,
    residual: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> tuple[Tensor, Fp8Rows | None]:
    """See ops.norm_backward."""
    dX, fp8 = torch.empty_like(x), None if column_scale is None else empty_fp8(len(x), x.shape[1], x.device)
    flags = {"CENTER": center, "RESIDUAL": residual is not None, "FP8": fp8 is not None}
    arguments = dY, x, weight, residual, dX, column_scale, *(fp8 or (x, x)), x.shape[1], eps
    launch(_norm_backward, len(x), *arguments, **flags, **row_shape(x.shape[1]))
    return dX, fp8


def qk_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: Heads, eps: float) -> Tensor:
    """See ops.qk_norm."""
    result, shape = torch.empty_like(qkv), heads_shape(heads.number, heads.size)
    launch(_qk_norm, len(qkv), qkv, q_weight, k_weight, result, *heads, eps, **shape)
    return result


def qk_norm_backward(dY: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: Heads, eps: float) -> Tensor:
    """See ops.qk_norm_backward; the result is written over dY."""
    shape = heads_shape(heads.number, heads.size)
    launch(_qk_norm_backward, len(qkv), dY, qkv, q_weight, k_weight, dY, *heads, eps, **shape)
    return dY
