"""Logits -> their cross-entropy, summed over the rows that have a target."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dianjing.constants import IGNORE_INDEX
from dianjing.layers.backend import has_kernel


@has_kernel("cross_entropy")
def summed_cross_entropy(logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
    """Return the sum over rows of log(sum(exp(logits))) - logits[target], in fp32, without rows of IGNORE_INDEX.

    On a GPU the gradient is written over the logits: nothing else of their size is made.
    """
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
