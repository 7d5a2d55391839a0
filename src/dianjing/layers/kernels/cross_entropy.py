"""Kernels of the loss: cross-entropy of the logits of a pack, and its gradient. `loss.py` says what they compute."""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from dianjing.layers.kernels.elementwise import launch

PART = 4096
"""Logits that a program holds at a time."""
LOWEST = tl.constexpr(-3e38)
"""Below every logit, and finite."""


@triton.jit
def _cross_entropy(logits, targets, losses, log_sums, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    source = logits + row * columns
    at = tl.arange(0, BLOCK)
    # Each place of a block has its own largest logit and its own sum: they meet once, behind the last block.
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        values = tl.load(source + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, values)
        total = total * tl.exp(largest - higher) + tl.exp(values - higher)
        largest = higher
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    counted = target >= 0
    found = tl.load(source + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counted, log_sum - found, 0.0))
    tl.store(log_sums + row, log_sum)


@triton.jit
def _cross_entropy_backward(logits, targets, log_sums, gradient, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = logits + row * columns + at
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    values = tl.exp(values - tl.load(log_sums + row)) - tl.where(at == target, 1.0, 0.0)
    values = tl.where(target >= 0, values * tl.load(gradient), 0.0)
    tl.store(place, values.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, log_sums: Tensor) -> None:
    """Fill `losses` and `log_sums`, a number for each row."""
    launch(_cross_entropy, len(logits), logits, targets, losses, log_sums, logits.shape[1], BLOCK=PART, num_warps=8)


def cross_entropy_backward(logits: Tensor, targets: Tensor, log_sums: Tensor, gradient: Tensor) -> None:
    """Write the gradient of the logits over them; `gradient` is that of the summed loss."""
    rows, columns = logits.shape
    kernel: Any = _cross_entropy_backward
    if rows:
        kernel[(rows, triton.cdiv(columns, PART))](logits, targets, log_sums, gradient, columns, BLOCK=PART)
