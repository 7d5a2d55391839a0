"""One pass over memory for what stands between the FP8 products of a gated MLP; Triton, which torch's GPU builds bring.

The compiler's own kernels read their rows twice: once for the largest number, once to divide by it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROW_OF_MANY_WARPS = 4096
"""Columns beyond which a row is spread over more threads, to stay in registers."""


@triton.jit
def _silu_product(gate, up, rows, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    g = tl.load(gate + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * u
    unit = tl.maximum(tl.max(tl.abs(y), axis=0), 1e-12) / 448.0
    tl.store(scale + row, unit)
    y = tl.minimum(tl.maximum(y / unit, -448.0), 448.0)
    tl.store(rows + row * columns + at, y.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _silu_product_backward(
    gradient,
    gate,
    up,
    gate_scale,
    up_scale,
    rows,
    scale,
    columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    d = tl.load(gradient + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    open_share = tl.sigmoid(g)
    to_up = d * g * open_share * tl.load(up_scale + at, mask=inside, other=0.0)
    to_gate = d * u * open_share * (1.0 + g * (1.0 - open_share))
    to_gate = to_gate * tl.load(gate_scale + at, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(to_gate), axis=0), tl.max(tl.abs(to_up), axis=0))
    unit = tl.maximum(largest, 1e-12) / 448.0
    tl.store(scale + row, unit)
    to_gate = tl.minimum(tl.maximum(to_gate / unit, -448.0), 448.0)
    to_up = tl.minimum(tl.maximum(to_up / unit, -448.0), 448.0)
    at_row = rows + 2 * row * columns + at
    tl.store(at_row, to_gate.to(rows.dtype.element_ty), mask=inside)
    tl.store(at_row + columns, to_up.to(rows.dtype.element_ty), mask=inside)


def silu_product(gate: Tensor, up: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return silu(gate) * up in FP8, and the scales of its rows."""
    rows, scale = torch.empty_like(gate, dtype=fp8), gate.new_empty(len(gate), 1, dtype=torch.float32)
    kernel: Any = _silu_product
    kernel[(len(gate),)](gate, up, rows, scale, gate.shape[1], **_shape(gate.shape[1]))
    return rows, scale


def silu_product_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor, up_scale: Tensor, fp8: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, times the scales of their columns, side by side in FP8 with row scales."""
    rows = gate.new_empty(len(gate), 2 * gate.shape[1], dtype=fp8)
    scale = gate.new_empty(len(gate), 1, dtype=torch.float32)
    kernel: Any = _silu_product_backward
    columns = gate.shape[1]
    kernel[(len(gate),)](gradient, gate, up, gate_scale, up_scale, rows, scale, columns, **_shape(columns))
    return rows, scale


def _shape(columns: int) -> dict[str, int]:
    return {"BLOCK": triton.next_power_of_2(columns), "num_warps": 16 if columns > ROW_OF_MANY_WARPS else 8}
