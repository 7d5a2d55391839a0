"""The frozen weights of fused linear layers in memory, with their GEMMs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dianjing.layers.fp8 import Fp8Linear, Fp8Rows, scaled_gemm
from dianjing.layers.fused.ops import transpose_fp8


class FrozenWeights:
    """The weights of layers that read the same input, stacked into one matrix W: q over k over v, say.

    The layers keep their parameters, which become views of W.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        names = ("rows", "scale") if isinstance(layers[0], Fp8Linear) else ("weight",)
        self.widths: list[int] = [layer.out_features for layer in layers]
        self._parameters: list[nn.Parameter] = [getattr(layer, names[0]) for layer in layers]
        stacked = [_stack([getattr(layer, name) for layer in layers]) for name in names]
        self.W = stacked[0]
        self.scale: Tensor | None = stacked[1].flatten() if len(stacked) > 1 else None
        """Of each row of W, if W is in FP8."""
        self.bias = _stack([layer.bias for layer in layers]) if layers[0].bias is not None else None
        self.augmented: list[Tensor] = []
        """[B | W] of the first group of rows and [W | B] of the next, once `make_room` has made room for B."""
        self._ones: Tensor | None = None

    def forward(self, X: Float[Tensor, "rows inputs"] | None, fp8: Fp8Rows | None) -> Float[Tensor, "rows outputs"]:
        """Return Y = X W' + b; `fp8` is X in FP8, for weights in FP8."""
        if self.scale is None:
            assert X is not None
            return X @ self.W.T if self.bias is None else torch.addmm(self.bias, X, self.W.T)
        assert fp8 is not None
        Y = scaled_gemm(*fp8, self.W.T, self.scale[None], torch.bfloat16 if X is None else X.dtype)
        if self.bias is not None:
            Y += self.bias
        return Y

    def backward(self, dY: Float[Tensor, "rows outputs"] | None, fp8: Fp8Rows | None) -> Float[Tensor, "rows inputs"]:
        """Return dX = dY W; `fp8` is dY times the scales of W's rows in FP8, for weights in FP8."""
        if self.scale is None:
            assert dY is not None
            return dY @ self.W
        assert fp8 is not None
        if self._ones is None:
            self._ones = self.scale.new_ones(1, self.W.shape[1])
        return scaled_gemm(*fp8, transpose_fp8(self.W), self._ones, torch.bfloat16 if dY is None else dY.dtype)

    def make_room(self, left: int, right: int, heights: Sequence[int]) -> None:
        """Move W to memory with room for `left` columns before its first group of rows, or `right` after the next one.

        Not before the first pass: until then engines send each weight to all ranks as one piece of memory.

        `heights` are the rows of each group. There is room for only one B per row: with `left`, the first group's lies
        before its rows and the second group's after, where the next row has its room, which it does not need.
        """
        rows, columns = self.W.shape
        ranks = max(left, right)
        stride = ranks + columns
        memory = self.W.new_zeros(rows * stride + ranks)
        self.W = memory.as_strided((rows, columns), (stride, 1), ranks).copy_(self.W)
        for parameter, part in zip(self._parameters, self.W.split(self.widths), strict=True):
            parameter.data = part
        before = 0
        if left:
            before = heights[0]
            self.augmented.append(memory.as_strided((before, stride), (stride, 1), 0))
        height = heights[len(self.augmented)]
        self.augmented.append(memory.as_strided((height, columns + right), (stride, 1), before * stride + ranks))


def _stack(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return parameters stacked into one tensor, of which each becomes a view."""
    if len(parameters) == 1:
        return parameters[0].detach()
    stacked = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, stacked.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return stacked
