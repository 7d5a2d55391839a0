"""Kernels of the loss: cross-entropy of logits, and its gradient. `cross_entropy.py` says what they compute."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd.function import once_differentiable

from dianjing.layers.kernels.launch import launch

PART = 4096
"""Logits that a program holds at a time."""
LOWEST = tl.constexpr(-3e38)
"""Below every logit, and finite."""


@triton.jit
def _cross_entropy(logits, targets, losses, lse, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    source = logits + row * columns
    at = tl.arange(0, BLOCK)
    # Each place of a block has its own largest logit and its own sum; they are reduced once, after the last block.
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        values = tl.load(source + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, values)
        total = total * tl.exp(largest - higher) + tl.exp(values - higher)
        largest = higher
    top = tl.max(largest, axis=0)
    log_sum_exp = top + tl.log(tl.sum(total * tl.exp(largest - top), axis=0))
    counted = target >= 0
    found = tl.load(source + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counted, log_sum_exp - found, 0.0))
    tl.store(lse + row, log_sum_exp)


@triton.jit
def _cross_entropy_backward(logits, targets, lse, d_loss, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = logits + row * columns + at
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    values = tl.exp(values - tl.load(lse + row)) - tl.where(at == target, 1.0, 0.0)
    values = tl.where(target >= 0, values * tl.load(d_loss), 0.0)
    tl.store(place, values.to(logits.dtype.element_ty), mask=inside)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """See cross_entropy.summed_cross_entropy; the gradient is written over the logits."""
    return cast(Tensor, _SummedCrossEntropy.apply(logits, targets))


class _SummedCrossEntropy(torch.autograd.Function):
    """L = sum over rows with a target t of lse - logits[t]; d logits = dL (softmax - onehot(t)), else zero.

    lse = log(sum(exp(logits))) of a row, in fp32. Keeps the logits and lse; the gradient is written over the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        losses, lse = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        columns = logits.shape[1]
        launch(_cross_entropy, len(logits), logits, targets, losses, lse, columns, BLOCK=PART, num_warps=8)
        ctx.save_for_backward(logits, targets, lse)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, targets, lse = ctx.saved_tensors
        rows, columns = logits.shape
        kernel: Any = _cross_entropy_backward
        if rows:
            kernel[(rows, triton.cdiv(columns, PART))](logits, targets, lse, d_loss, columns, BLOCK=PART)
        # A second backward pass over the same graph is refused, as for any tensor that was changed in place.
        torch.autograd.graph.increment_version(logits)
        return logits, None
