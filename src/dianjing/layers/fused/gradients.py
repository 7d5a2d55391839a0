"""Where the gradients of adapters go: returned to autograd, or added in place to what the weights hold already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dianjing.layers.gemm import add_gemm_tn, gemm_tn


def weight_gradients(
    weights: Sequence[nn.Parameter],
    a: Float[Tensor, "rows left"],
    b: Float[Tensor, "rows right"],
    scale: float,
    *,
    accumulate: bool,
) -> list[Tensor | None]:
    """Return scale * a.T @ b, cut by rows into the gradients of weights, in fp32.

    With `accumulate`, the product is added in place to the gradients that the weights hold, if these are one piece of
    memory, as the products returned for an earlier pack are; None is then returned for each, and autograd adds nothing.
    """
    held = _held(weights) if accumulate else None
    if held is None:
        return [*gemm_tn(a, b, scale).split([len(weight) for weight in weights])]
    add_gemm_tn(a, b, scale, held)
    return [None] * len(weights)


def _held(weights: Sequence[nn.Parameter]) -> Tensor | None:
    """Return the gradients of weights as one matrix, if they follow each other in memory."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    first = gradients[0] if len(gradients) == len(weights) else None
    if first is None or any(gradient.dtype != torch.float32 or not gradient.is_contiguous() for gradient in gradients):
        return None
    end = first.data_ptr()
    for gradient in gradients:
        if gradient.data_ptr() != end or gradient.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += 4 * gradient.numel()
    columns = first.shape[1]
    return first.as_strided((sum(len(gradient) for gradient in gradients), columns), (columns, 1))
