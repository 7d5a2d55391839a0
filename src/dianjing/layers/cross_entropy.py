"""Logits -> their cross-entropy, summed over the rows that have a target."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dianjing.constants import IGNORE_INDEX


def summed_cross_entropy(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Return the cross-entropy in fp32, summed; rows whose target is IGNORE_INDEX do not count.

    On a GPU the logits are used up: their gradient is written over them, and nothing else of their size is made.
    """
    if logits.is_cuda:
        return cast(Tensor, _SummedCrossEntropy.apply(logits, targets))
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        from dianjing.layers.kernels import cross_entropy as kernels_of_loss

        losses, log_sums = (torch.empty(len(logits), device=logits.device) for _ in range(2))
        kernels_of_loss.cross_entropy(logits, targets, losses, log_sums)
        ctx.save_for_backward(logits, targets, log_sums)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        from dianjing.layers.kernels import cross_entropy as kernels_of_loss

        logits, targets, log_sums = ctx.saved_tensors
        kernels_of_loss.cross_entropy_backward(logits, targets, log_sums, gradient)
        # A second backward pass over the same graph is refused, as for any tensor that was changed in place.
        torch.autograd.graph.increment_version(logits)
        return logits, None
