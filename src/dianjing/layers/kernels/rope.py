"""Kernels of rotary positions (RoPE). `fused/ops.py` says what they compute; a program takes all heads of a token."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.fp8 import Fp8Rows
from dianjing.layers.fused.ops import Heads
from dianjing.layers.kernels.fp8 import FP8_MAX, TINY, empty_fp8, to_fp8
from dianjing.layers.kernels.launch import heads_shape, launch


@triton.jit
def _of_head(query, key, value, slot, head, heads, kv_heads, size):
    """Return where each head of a slot begins: those of queries, then of keys, then of values."""
    of_query = query + (slot * heads + head) * size
    of_key = key + (slot * kv_heads + head - heads) * size
    of_value = value + (slot * kv_heads + head - heads - kv_heads) * size
    return tl.where(head < heads, of_query, tl.where(head < heads + kv_heads, of_key, of_value))


@triton.jit
def _rope(
    qkv,
    cos,
    sin,
    tokens,
    query,
    key,
    value,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    GATHER: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + slot).to(tl.int64) if GATHER else slot
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < half)
    there = inside & (token >= 0)
    size = 2 * half
    source = qkv + token * number * size + head * size + at
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * size + at, mask=(at < half) & (token >= 0), other=0.0).to(tl.float32)
    s = tl.load(sin + token * size + at, mask=(at < half) & (token >= 0), other=0.0).to(tl.float32)
    rotated = head < heads + kv_heads
    left = tl.where(rotated, first * c - second * s, first)
    right = tl.where(rotated, second * c + first * s, second)
    target = _of_head(query, key, value, slot, head, heads, kv_heads, size) + at
    tl.store(target, left.to(query.dtype.element_ty), mask=inside)
    tl.store(target + half, right.to(query.dtype.element_ty), mask=inside)


@triton.jit
def _rope_backward(
    query,
    key,
    value,
    cos,
    sin,
    slots,
    column_scale,
    d_qkv,
    fp8,
    scale,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    GATHER: tl.constexpr,
    KEEP: tl.constexpr,
    FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64) if GATHER else token
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, SIZE)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < half)
    size = 2 * half
    there = inside & (slot >= 0)
    source = _of_head(query, key, value, slot, head, heads, kv_heads, size) + at
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * size + at, mask=at < half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * size + at, mask=at < half, other=0.0).to(tl.float32)
    rotated = head < heads + kv_heads
    left = tl.where(rotated, first * c + second * s, first)
    right = tl.where(rotated, second * c - first * s, second)
    at_row = token * number * size + head * size + at
    if KEEP:
        tl.store(d_qkv + at_row, left.to(d_qkv.dtype.element_ty), mask=inside)
        tl.store(d_qkv + at_row + half, right.to(d_qkv.dtype.element_ty), mask=inside)
    if FP8:
        left = left * tl.load(column_scale + head * size + at, mask=inside, other=0.0)
        right = right * tl.load(column_scale + head * size + at + half, mask=inside, other=0.0)
        largest = tl.maximum(tl.max(tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1), axis=0), TINY)
        tl.store(scale + token, largest / FP8_MAX)
        tl.store(fp8 + at_row, to_fp8(left, largest, fp8), mask=inside)
        tl.store(fp8 + at_row + half, to_fp8(right, largest, fp8), mask=inside)


def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.rope."""
    number = len(qkv) if tokens is None else len(tokens)
    counts = heads.query, heads.key_value, heads.key_value
    query, key, value = (qkv.new_empty(number, count, heads.size) for count in counts)
    shape = heads_shape(heads.number, heads.size // 2)
    arguments = qkv, cos, sin, tokens, query, key, value, heads.query, heads.key_value, heads.size // 2
    launch(_rope, number, *arguments, GATHER=tokens is not None, **shape)
    return query, key, value


def rope_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None = None,
    *,
    keep: bool = True,
    column_scale: Tensor | None = None,
) -> tuple[Tensor | None, Fp8Rows | None]:
    """See ops.rope_backward."""
    heads = Heads(query.shape[1], key.shape[1], query.shape[2])
    number, columns = len(cos), heads.number * heads.size
    d_qkv = query.new_empty(number, columns) if keep else None
    fp8 = None if column_scale is None else empty_fp8(number, columns, query.device)
    flags = {"GATHER": slots is not None, "KEEP": keep, "FP8": fp8 is not None}
    sizes = heads.query, heads.key_value, heads.size // 2
    arguments = query, key, value, cos, sin, slots, column_scale, d_qkv, *(fp8 or (query, query)), *sizes
    launch(_rope_backward, number, *arguments, **flags, **heads_shape(heads.number, heads.size // 2))
    return d_qkv, fp8
