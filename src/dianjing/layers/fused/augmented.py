"""The augmented matrix: rows X and the products XA of their adapters in one piece of memory, for one GEMM with both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dianjing.layers.fused.adapters import Copies, LoraAdapters
from dianjing.layers.fused.ops import Augmented
from dianjing.layers.fused.weights import FrozenWeights


class AugmentedLayout(NamedTuple):
    """Where XA stands next to X, and s B next to the frozen weights.

    One group of adapters: Y = [X | XA] [W | s B]'. Several: the first one's Y is [XA0 | X] [s B0 | W0]', the second
    one's [X | XA1] [W1 | s B1]', and that of others X W2', to which XA2 (s B2)' is added.
    """

    left: int
    """Columns of XA before X: the first group's, of several."""
    right: int
    """Columns of XA after X that a GEMM reads with X: the second group's, or the only one's."""
    inputs: int

    def empty(self, x: Float[Tensor, "rows inputs"], ranks: int) -> Augmented:
        """Return an augmented matrix, still empty, for rows like x and `ranks` columns of XA."""
        return Augmented(x.new_empty(len(x), self.inputs + ranks), self.left, self.inputs)

    def room(self, number: int, weights: FrozenWeights, lora: LoraAdapters) -> Tensor | None:
        """Return the room next to the frozen weights for the B of a group; None if it has none there."""
        if not weights.augmented:
            weights.make_room(self.left, self.right, [sum(group.widths) for group in lora.groups])
        if number >= len(weights.augmented):
            return None
        ranks, matrix = sum(lora.groups[number].ranks), weights.augmented[number]
        return matrix[:, :ranks] if self.left and number == 0 else matrix[:, -ranks:]

    def split_ranks(self, matrix: Tensor, lora: LoraAdapters) -> Sequence[Tensor]:
        """Return the columns of XA of each group in an augmented matrix."""
        sizes = [sum(group.ranks) for group in lora.groups]
        if not self.left:
            return matrix.split([self.inputs, *sizes], dim=1)[1:]
        first, _, *others = matrix.split([sizes[0], self.inputs, *sizes[1:]], dim=1)
        return [first, *others]

    def forward(self, augmented: Augmented, weights: FrozenWeights, lora: LoraAdapters, copies: Copies) -> Tensor:
        """Write XA next to X, and return Y."""
        X, matrix = augmented.X, augmented.matrix
        end, (A, B) = self.left + self.inputs, copies
        if self.left:
            torch.mm(X, A[: self.left].T, out=matrix[:, : self.left])
        torch.mm(X, A[self.left :].T, out=matrix[:, end:])
        Y = X.new_empty(len(X), len(weights.W))
        heights = [len(part) for part in B]
        biases = [None] * len(B) if weights.bias is None else weights.bias.split(heights)
        matrices = [*weights.augmented, *weights.W.split(heights)[len(weights.augmented) :]]
        spans = [slice(0, end)] if self.left else []
        spans.append(slice(self.left, end + self.right))
        parts = zip(lora.split_outputs(Y), self.split_ranks(matrix, lora), B, strict=True)
        for number, (columns, ranks, part) in enumerate(parts):
            rows = matrix[:, spans[number] if number < len(spans) else slice(self.left, end)]
            if (bias := biases[number]) is None:
                torch.mm(rows, matrices[number].T, out=columns)
            else:
                torch.addmm(bias, rows, matrices[number].T, out=columns)
            if number >= len(spans):
                columns.addmm_(ranks, part.T)
        return Y
