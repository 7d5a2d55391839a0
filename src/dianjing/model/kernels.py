"""Kernels for what stands between a layer's matrix products, each one pass over memory; Triton, which torch's GPU builds
bring.

`passes.py` says what each of them computes. A program takes one row (of a token, or of a patch) and holds all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LARGEST = tl.constexpr(448.0)
"""Largest number of FP8 (e4m3)."""
TINY = tl.constexpr(1e-12)
TILE = 64
"""Side of the squares in which a matrix is turned."""
FLAT = 2048
"""Numbers that a program takes of a tensor without rows."""


@triton.jit
def _store_eight_bits(values, inside, eight, at_row, scale, row):
    """Write a row in FP8, its largest number as LARGEST, and its scale."""
    unit = tl.maximum(tl.max(tl.abs(values), axis=0), TINY) / LARGEST
    tl.store(scale + row, unit)
    values = tl.minimum(tl.maximum(values / unit, -LARGEST), LARGEST)
    tl.store(eight + at_row, values.to(eight.dtype.element_ty), mask=inside)


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
        tl.store(rows + at_row, values.to(rows.dtype.element_ty), mask=inside)
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
        largest = tl.maximum(tl.max(tl.abs(to_gate), axis=0), tl.max(tl.abs(to_up), axis=0))
        unit = tl.maximum(largest, TINY) / LARGEST
        tl.store(scale + row, unit)
        to_gate = tl.minimum(tl.maximum(to_gate / unit, -LARGEST), LARGEST)
        to_up = tl.minimum(tl.maximum(to_up / unit, -LARGEST), LARGEST)
        tl.store(eight + at_gate, to_gate.to(eight.dtype.element_ty), mask=inside)
        tl.store(eight + at_gate + columns, to_up.to(eight.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    qkv,
    cos,
    sin,
    rows,
    query,
    key,
    value,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    MOVED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + place).to(tl.int64) if MOVED else place
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < half)
    there = inside & (token >= 0)
    size = 2 * half
    source = qkv + token * number * size + head * size + at
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
    along = tl.load(cos + token * size + at, mask=(at < half) & (token >= 0), other=0.0).to(tl.float32)
    across = tl.load(sin + token * size + at, mask=(at < half) & (token >= 0), other=0.0).to(tl.float32)
    turned = head < heads + kv_heads
    left = tl.where(turned, first * along - second * across, first)
    right = tl.where(turned, second * along + first * across, second)
    kind = query.dtype.element_ty
    left, right = left.to(kind), right.to(kind)
    is_query = inside & (head < heads)
    target = query + (place * heads + head) * size + at
    tl.store(target, left, mask=is_query)
    tl.store(target + half, right, mask=is_query)
    is_key = inside & (head >= heads) & (head < heads + kv_heads)
    target = key + (place * kv_heads + head - heads) * size + at
    tl.store(target, left, mask=is_key)
    tl.store(target + half, right, mask=is_key)
    is_value = inside & (head >= heads + kv_heads)
    target = value + (place * kv_heads + head - heads - kv_heads) * size + at
    tl.store(target, left, mask=is_value)
    tl.store(target + half, right, mask=is_value)


@triton.jit
def _rotate_backward(
    query,
    key,
    value,
    cos,
    sin,
    places,
    column_scale,
    to_qkv,
    eight,
    scale,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    MOVED: tl.constexpr,
    KEEP: tl.constexpr,
    EIGHT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token).to(tl.int64) if MOVED else token
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    number = heads + 2 * kv_heads
    inside = (head < number) & (at < half)
    size = 2 * half
    there = inside & (place >= 0)
    is_query = there & (head < heads)
    source = query + (place * heads + head) * size + at
    first = tl.load(source, mask=is_query, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=is_query, other=0.0).to(tl.float32)
    is_key = there & (head >= heads) & (head < heads + kv_heads)
    source = key + (place * kv_heads + head - heads) * size + at
    first += tl.load(source, mask=is_key, other=0.0).to(tl.float32)
    second += tl.load(source + half, mask=is_key, other=0.0).to(tl.float32)
    is_value = there & (head >= heads + kv_heads)
    source = value + (place * kv_heads + head - heads - kv_heads) * size + at
    first += tl.load(source, mask=is_value, other=0.0).to(tl.float32)
    second += tl.load(source + half, mask=is_value, other=0.0).to(tl.float32)
    along = tl.load(cos + token * size + at, mask=at < half, other=0.0).to(tl.float32)
    across = tl.load(sin + token * size + at, mask=at < half, other=0.0).to(tl.float32)
    turned = head < heads + kv_heads
    left = tl.where(turned, first * along + second * across, first)
    right = tl.where(turned, second * along - first * across, second)
    at_row = token * number * size + head * size + at
    if KEEP:
        tl.store(to_qkv + at_row, left.to(to_qkv.dtype.element_ty), mask=inside)
        tl.store(to_qkv + at_row + half, right.to(to_qkv.dtype.element_ty), mask=inside)
    if EIGHT:
        left = left * tl.load(column_scale + head * size + at, mask=inside, other=0.0)
        right = right * tl.load(column_scale + head * size + at + half, mask=inside, other=0.0)
        largest = tl.max(tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1), axis=0)
        unit = tl.maximum(largest, TINY) / LARGEST
        tl.store(scale + token, unit)
        left = tl.minimum(tl.maximum(left / unit, -LARGEST), LARGEST)
        right = tl.minimum(tl.maximum(right / unit, -LARGEST), LARGEST)
        tl.store(eight + at_row, left.to(eight.dtype.element_ty), mask=inside)
        tl.store(eight + at_row + half, right.to(eight.dtype.element_ty), mask=inside)


@triton.jit
def _quantize(
    x, taken, column_scale, eight, scale, columns, BLOCK: tl.constexpr, MOVED: tl.constexpr, SCALED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(taken + row).to(tl.int64) if MOVED else row
    at = tl.arange(0, BLOCK)
    inside = at < columns
    values = tl.load(x + source * columns + at, mask=inside & (source >= 0), other=0.0).to(tl.float32)
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


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activation(
    x, rows, gradient, to_x, number, KIND: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "quick_gelu":
        share = tl.sigmoid(1.702 * v)
        steep = share * (1.0 + 1.702 * v * (1.0 - share))
    elif KIND == "gelu_pytorch_tanh":
        bend = _tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))
        share = 0.5 * (1.0 + bend)
        steep = share + 0.5 * v * (1.0 - bend * bend) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * v * v)
    else:
        share = 0.5 * (1.0 + tl.erf(0.7071067811865476 * v))
        steep = share + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    if KEEP:
        tl.store(rows + at, (v * share).to(rows.dtype.element_ty), mask=inside)
    if BACK:
        arriving = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(to_x + at, (arriving * steep).to(to_x.dtype.element_ty), mask=inside)


@triton.jit
def _drop(x, into, seed, share, number, ADD: tl.constexpr, SIZE: tl.constexpr):
    """Keep each number with the probability 1 - share, and make up for the others; four draws at a time."""
    quarter: tl.constexpr = SIZE // 4
    draw = tl.program_id(0).to(tl.int64) * quarter + tl.arange(0, quarter)
    one, two, three, four = tl.rand4x(seed, draw)
    base = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, quarter)
    _drop_quarter(x, into, one, base, share, number, ADD)
    _drop_quarter(x, into, two, base + quarter, share, number, ADD)
    _drop_quarter(x, into, three, base + 2 * quarter, share, number, ADD)
    _drop_quarter(x, into, four, base + 3 * quarter, share, number, ADD)


@triton.jit
def _drop_quarter(x, into, drawn, at, share, number, ADD: tl.constexpr):
    inside = at < number
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(drawn >= share, values / (1.0 - share), 0.0)
    if ADD:
        values += tl.load(into + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(into + at, values.to(into.dtype.element_ty), mask=inside)


@triton.jit
def _sum_of_parts(
    parts, a, b, total, scale, number, columns, a_stride, b_stride, left_over, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(parts + at, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        values += tl.load(parts + part * number + at, mask=inside, other=0.0)
    for row in range(left_over):
        left = tl.load(a + row * a_stride + at // columns, mask=inside, other=0.0).to(tl.float32)
        values += left * tl.load(b + row * b_stride + at % columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, values * scale, mask=inside)


def _launch(kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
    if programs:
        kernel[(programs,)](*arguments, **settings)


def _shape(columns: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(columns), "num_warps": 16 if columns > 4096 else 8 if columns > 1024 else 4}


def norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor | None,
    rows: Tensor | None,
    eight: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill `total`, `rows` and `eight`."""
    flags = {"ADD": y is not None, "CENTRE": bias is not None, "KEEP": rows is not None, "EIGHT": eight is not None}
    pair = eight or (x, x)
    _launch(_norm, len(x), x, y, weight, bias, total, rows, *pair, x.shape[1], eps, **flags, **_shape(x.shape[1]))


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
    _launch(_norm_backward, len(x), *arguments, **flags, **_shape(x.shape[1]))


def gated(gate_up: Tensor, rows: Tensor | None, eight: tuple[Tensor, Tensor] | None) -> None:
    """Fill `rows` and `eight`."""
    columns = gate_up.shape[1] // 2
    flags = {"KEEP": rows is not None, "EIGHT": eight is not None}
    _launch(_gated, len(gate_up), gate_up, rows, *(eight or (gate_up, gate_up)), columns, **flags, **_shape(columns))


def gated_backward(
    gradient: Tensor,
    gate_up: Tensor,
    column_scale: Tensor | None,
    to_gate_up: Tensor | None,
    eight: tuple[Tensor, Tensor] | None,
    rows: Tensor | None,
) -> None:
    """Fill `to_gate_up`, `eight` and `rows`."""
    columns = gate_up.shape[1] // 2
    flags = {"KEEP": to_gate_up is not None, "EIGHT": eight is not None, "AGAIN": rows is not None}
    pair = eight or (gate_up, gate_up)
    arguments = gradient, gate_up, column_scale, to_gate_up, *pair, rows, columns
    shape = _shape(columns)
    if flags["KEEP"] and flags["EIGHT"] and columns > 4096:
        shape["num_warps"] = 32  # what it holds of a row would not fit in the registers of fewer
    _launch(_gated_backward, len(gate_up), *arguments, **flags, **shape)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Fill `query`, `key` and `value`."""
    _, heads, size = query.shape
    settings = _heads_shape(heads, key.shape[1], size) | {"MOVED": rows is not None}
    _launch(_rotate, len(query), qkv, cos, sin, rows, query, key, value, heads, key.shape[1], size // 2, **settings)


def rotate_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    places: Tensor | None,
    column_scale: Tensor | None,
    to_qkv: Tensor | None,
    eight: tuple[Tensor, Tensor] | None,
) -> None:
    """Fill `to_qkv` and `eight`."""
    _, heads, size = query.shape
    flags = {"MOVED": places is not None, "KEEP": to_qkv is not None, "EIGHT": eight is not None}
    pair = eight or (query, query)
    arguments = query, key, value, cos, sin, places, column_scale, to_qkv, *pair, heads, key.shape[1], size // 2
    _launch(_rotate_backward, len(cos), *arguments, **flags, **_heads_shape(heads, key.shape[1], size))


def _heads_shape(heads: int, kv_heads: int, size: int) -> dict[str, Any]:
    sides = triton.next_power_of_2(heads + 2 * kv_heads), triton.next_power_of_2(size // 2)
    return {"HEADS": sides[0], "HALF": sides[1], "num_warps": 8 if sides[0] * sides[1] > 1024 else 4}


def quantize(x: Tensor, taken: Tensor | None, column_scale: Tensor | None, eight: tuple[Tensor, Tensor]) -> None:
    """Fill `eight`."""
    flags = {"MOVED": taken is not None, "SCALED": column_scale is not None}
    columns = x.shape[1]
    _launch(_quantize, len(eight[0]), x, taken, column_scale, *eight, columns, **flags, **_shape(columns))


def spread(x: Tensor, rows: Tensor, result: Tensor) -> None:
    """Fill `result`."""
    _launch(_spread, len(rows), x, rows, result, x.shape[1], **_shape(x.shape[1]))


def turn(matrix: Tensor, turned: Tensor) -> None:
    """Fill `turned` with the transpose of a matrix."""
    rows, columns = matrix.shape
    kernel: Any = _turn
    kernel[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](matrix, turned, rows, columns, SIDE=TILE)


def activation(
    x: Tensor, kind: str, rows: Tensor | None, gradient: Tensor | None = None, to_x: Tensor | None = None
) -> None:
    """Fill `rows` and `to_x`."""
    flags: dict[str, Any] = {"KIND": kind, "KEEP": rows is not None, "BACK": to_x is not None}
    _launch(_activation, triton.cdiv(x.numel(), FLAT), x, rows, gradient, to_x, x.numel(), **flags, SIZE=FLAT)


def drop(x: Tensor, into: Tensor, seed: int, share: float, *, add: bool) -> None:
    """Put what dropout leaves of `x` into `into`, or add it there."""
    _launch(_drop, triton.cdiv(x.numel(), FLAT), x, into, seed, share, x.numel(), ADD=add, SIZE=FLAT)


def sum_of_parts(parts: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale times (the sum over the first dimension + a.T @ b), where a and b have few rows."""
    total = torch.empty_like(parts[0])
    sizes = total.numel(), total.shape[1], a.stride(0), b.stride(0), len(a)
    _launch(_sum_of_parts, triton.cdiv(sizes[0], FLAT), parts, a, b, total, scale, *sizes, PARTS=len(parts), SIZE=FLAT)
    return total
