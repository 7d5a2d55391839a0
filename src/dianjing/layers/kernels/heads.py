"""Kernels of joined layers that take heads or single numbers: rotary positions, activations, dropout.

`passes.py` says what each of them computes.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.elementwise import LARGEST, TINY, eight_bits, launch

FLAT = 2048
"""Numbers that a program takes of a tensor without rows."""
DRAWS = 65_536
"""How many numbers a draw of dropout may be."""
ROUNDS = tl.constexpr(7)
"""Of Philox, from which dropout is drawn: with seven it passes the tests of randomness that there are (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011)."""


@triton.jit
def _of_head(query, key, value, place, head, heads, kv_heads, size):
    """Return where a place's heads begin: those of queries, then of keys, then of values."""
    of_query = query + (place * heads + head) * size
    of_key = key + (place * kv_heads + head - heads) * size
    of_value = value + (place * kv_heads + head - heads - kv_heads) * size
    return tl.where(head < heads, of_query, tl.where(head < heads + kv_heads, of_key, of_value))


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
    target = _of_head(query, key, value, place, head, heads, kv_heads, size) + at
    tl.store(target, left.to(query.dtype.element_ty), mask=inside)
    tl.store(target + half, right.to(query.dtype.element_ty), mask=inside)


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
    source = _of_head(query, key, value, place, head, heads, kv_heads, size) + at
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=there, other=0.0).to(tl.float32)
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
        largest = tl.maximum(tl.max(tl.max(tl.maximum(tl.abs(left), tl.abs(right)), axis=1), axis=0), TINY)
        tl.store(scale + token, largest / LARGEST)
        tl.store(eight + at_row, eight_bits(left, largest, eight), mask=inside)
        tl.store(eight + at_row + half, eight_bits(right, largest, eight), mask=inside)


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
def _drawn(seed, program, SIZE: tl.constexpr):
    """Return whole numbers below 65,536, those of a program: eight to a draw."""
    draw = program * (SIZE // 8) + tl.arange(0, SIZE // 8)
    one, two, three, four = tl.randint4x(seed, draw, ROUNDS)
    words = tl.join(tl.join(one, two), tl.join(three, four))
    return tl.reshape(tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF), (SIZE,))


@triton.jit
def _drop(x, results, seeds, number, least, up, SEEDS: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * up
    target = results + at
    for which in tl.static_range(SEEDS):
        kept = _drawn(tl.load(seeds + which), program, SIZE) >= least
        tl.store(target, tl.where(kept, values, 0.0).to(results.dtype.element_ty), mask=inside)
        target += number


@triton.jit
def _add_dropped(parts, into, seeds, number, least, up, SEEDS: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    at = program.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    values = tl.load(into + at, mask=inside, other=0.0).to(tl.float32)
    source = parts + at
    for which in tl.static_range(SEEDS):
        kept = _drawn(tl.load(seeds + which), program, SIZE) >= least
        values += tl.where(kept, tl.load(source, mask=inside, other=0.0).to(tl.float32) * up, 0.0)
        source += number
    tl.store(into + at, values.to(into.dtype.element_ty), mask=inside)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Fill `query`, `key` and `value`."""
    _, heads, size = query.shape
    settings = _heads_shape(heads, key.shape[1], size) | {"MOVED": rows is not None}
    launch(_rotate, len(query), qkv, cos, sin, rows, query, key, value, heads, key.shape[1], size // 2, **settings)


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
    launch(_rotate_backward, len(cos), *arguments, **flags, **_heads_shape(heads, key.shape[1], size))


def _heads_shape(heads: int, kv_heads: int, size: int) -> dict[str, Any]:
    sides = triton.next_power_of_2(heads + 2 * kv_heads), triton.next_power_of_2(size // 2)
    return {"HEADS": sides[0], "HALF": sides[1], "num_warps": 8 if sides[0] * sides[1] > 1024 else 4}


def activation(
    x: Tensor, kind: str, rows: Tensor | None, gradient: Tensor | None = None, to_x: Tensor | None = None
) -> None:
    """Fill `rows`, which may be x, and `to_x`, which may be `gradient`."""
    flags: dict[str, Any] = {"KIND": kind, "KEEP": rows is not None, "BACK": to_x is not None}
    launch(_activation, triton.cdiv(x.numel(), FLAT), x, rows, gradient, to_x, x.numel(), **flags, SIZE=FLAT)


def drop(x: Tensor, results: Tensor, seeds: Tensor, share: float) -> None:
    """Fill `results`."""
    launch(_drop, triton.cdiv(x.numel(), FLAT), x, results, seeds, x.numel(), *_kept(share), **_drop_shape(seeds))


def add_dropped(parts: Tensor, into: Tensor, seeds: Tensor, share: float) -> None:
    """Add to `into`."""
    number = into.numel()
    launch(_add_dropped, triton.cdiv(number, FLAT), parts, into, seeds, number, *_kept(share), **_drop_shape(seeds))


def _kept(share: float) -> tuple[int, float]:
    """Return the smallest draw with which a number is kept, and what it is multiplied with then."""
    dropped = min(round(share * DRAWS), DRAWS - 1)
    return dropped, DRAWS / (DRAWS - dropped)


def _drop_shape(seeds: Tensor) -> dict[str, Any]:
    return {"SEEDS": len(seeds), "SIZE": FLAT}
