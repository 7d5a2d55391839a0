"""Kernels of gated MLPs and of activations. `fused/ops.py` says what each computes.

A program of a gated MLP takes the row of one token; one of an activation takes numbers in any order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.fp8 import Fp8Rows
from dianjing.layers.kernels.fp8 import FP8_MAX, TINY, empty_fp8, store_fp8_row, to_fp8
from dianjing.layers.kernels.launch import FLAT, flat_programs, launch, row_shape


@triton.jit
def _swiglu(gate_up, rows, fp8, scale, columns, BLOCK: tl.constexpr, KEEP: tl.constexpr, FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(gate_up + 2 * row * columns + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * columns + at, mask=inside, other=0.0).to(tl.float32)
    values = gate * tl.sigmoid(gate) * up
    if KEEP:
        tl.store(rows + row * columns + at, values.to(rows.dtype.element_ty), mask=inside)
    if FP8:
        store_fp8_row(values, inside, fp8, row * columns + at, scale, row)


@triton.jit
def _swiglu_backward(
    dY,
    gate_up,
    column_scale,
    d_gate_up,
    fp8,
    scale,
    rows,
    columns,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
    FP8: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    at_gate = 2 * row * columns + at
    dy = tl.load(dY + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at_gate + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if RECOMPUTE:
        tl.store(rows + row * columns + at, (silu * up).to(rows.dtype.element_ty), mask=inside)
    d_up = dy * silu
    d_gate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    if KEEP:
        tl.store(d_gate_up + at_gate, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
        tl.store(d_gate_up + at_gate + columns, d_up.to(d_gate_up.dtype.element_ty), mask=inside)
    if FP8:
        d_gate = d_gate * tl.load(column_scale + at, mask=inside, other=0.0)
        d_up = d_up * tl.load(column_scale + columns + at, mask=inside, other=0.0)
        largest = tl.maximum(tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), axis=0), TINY)
        tl.store(scale + row, largest / FP8_MAX)
        tl.store(fp8 + at_gate, to_fp8(d_gate, largest, fp8), mask=inside)
        tl.store(fp8 + at_gate + columns, to_fp8(d_up, largest, fp8), mask=inside)


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activation(
    x, rows, dY, dX, number, KIND: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr, SIZE: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < number
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # The activation is v * gate; `slope` is its derivative.
    if KIND == "quick_gelu":
        gate = tl.sigmoid(1.702 * v)
        slope = gate * (1.0 + 1.702 * v * (1.0 - gate))
    elif KIND == "gelu_pytorch_tanh":
        tanh = _tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))
        gate = 0.5 * (1.0 + tanh)
        slope = gate + 0.5 * v * (1.0 - tanh * tanh) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * v * v)
    else:
        gate = 0.5 * (1.0 + tl.erf(0.7071067811865476 * v))
        slope = gate + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    if KEEP:
        tl.store(rows + at, (v * gate).to(rows.dtype.element_ty), mask=inside)
    if BACKWARD:
        dy = tl.load(dY + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dX + at, (dy * slope).to(dX.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, *, keep: bool = True, fp8: bool = False) -> tuple[Tensor | None, Fp8Rows | None]:
    """See ops.swiglu."""
    number, columns = len(gate_up), gate_up.shape[1] // 2
    rows = gate_up.new_empty(number, columns) if keep else None
    in_fp8 = empty_fp8(number, columns, gate_up.device) if fp8 else None
    arguments = gate_up, rows, *(in_fp8 or (gate_up, gate_up)), columns
    launch(_swiglu, number, *arguments, KEEP=keep, FP8=fp8, **row_shape(columns))
    return rows, in_fp8


def swiglu_backward(
    dY: Tensor,
    gate_up: Tensor,
    *,
    keep: bool = True,
    column_scale: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor | None, Fp8Rows | None, Tensor | None]:
    """See ops.swiglu_backward; the gradient is written over gate_up, the recomputed rows over dY."""
    number, columns = len(gate_up), gate_up.shape[1] // 2
    fp8 = None if column_scale is None else empty_fp8(len(gate_up), gate_up.shape[1], gate_up.device)
    d_gate_up, rows = gate_up if keep else None, dY if recompute else None
    flags = {"KEEP": keep, "FP8": fp8 is not None, "RECOMPUTE": recompute}
    arguments = dY, gate_up, column_scale, d_gate_up, *(fp8 or (gate_up, gate_up)), rows, columns
    shape = row_shape(columns)
    if flags["KEEP"] and flags["FP8"] and columns > 4096:
        shape["num_warps"] = 32  # what it holds of a row would not fit in the registers of fewer
    elif flags["FP8"] and shape["BLOCK"] == 8192:
        shape |= {"num_warps": 32, "maxnreg": 32}  # two programs at a time: one reads while the other writes
    launch(_swiglu_backward, number, *arguments, **flags, **shape)
    return d_gate_up, fp8, rows


def activation(x: Tensor, kind: str) -> Tensor:
    """See ops.activation."""
    rows = torch.empty_like(x)
    _launch_activation(x, kind, rows, None, None)
    return rows


def activation_backward(dY: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """See ops.activation_backward; the gradient is written over dY, the recomputed activation over x."""
    _launch_activation(x, kind, x, dY, dY)
    return dY, x


def _launch_activation(x: Tensor, kind: str, rows: Tensor, dY: Tensor | None, dX: Tensor | None) -> None:
    flags: dict[str, Any] = {"KIND": kind, "KEEP": True, "BACKWARD": dX is not None}
    launch(_activation, flat_programs(x.numel()), x, rows, dY, dX, x.numel(), **flags, SIZE=FLAT)
