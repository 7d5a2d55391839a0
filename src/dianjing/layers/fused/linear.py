"""Frozen linear layers with the same input and their LoRA adapters, fused into as few GEMMs as a GPU wants.

    Y  = X W' + b + s (X A') B'
    dX = dY W + s (dY B) A  =  dY (W + s B A)
    dA = s (dY B)' X,  dB = s dY' (X A')

README.md, one folder up, has the whole of it: dropout, FP8, the augmented matrix, what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dianjing.layers.fp8 import Fp8Linear, Fp8Rows
from dianjing.layers.fused.adapters import Copies, LoraAdapters, dropout_of, weights_of
from dianjing.layers.fused.augmented import AugmentedLayout
from dianjing.layers.fused.ops import Augmented, Seeds
from dianjing.layers.fused.weights import FrozenWeights
from dianjing.layers.gemm import addmm_out
from dianjing.layers.lora import ADAPTER, LoraLinear


class FusedLinear:
    """Layers that read the same X (q, k and v; gate and up; or one alone), computed as one layer.

    `augment`: the caller can write X into an augmented matrix (augmented.py), and one GEMM multiplies X and XA.

    `for_cuda_graph`: the layer may be captured in a CUDA graph. The sum W + s B A that gradients go through is then
    made once for each change of the adapters, not for each pack, and takes as much memory as W; gradients are returned
    to autograd. Otherwise the sum is not kept, and gradients are added in place to those of earlier packs.
    """

    def __init__(self, layers: Sequence[nn.Module], *, augment: bool = False, for_cuda_graph: bool = False) -> None:
        self.weights = FrozenWeights([_base(layer) for layer in layers])
        adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self.lora = LoraAdapters(adapted, accumulate=not for_cuda_graph) if adapted else None
        self._keeps_sum = for_cuda_graph
        self._layout: AugmentedLayout | None = None
        if self.lora and augment and not self.is_fp8:
            left = self.lora.rank if len(self.lora.groups) > 1 else 0
            self._layout = AugmentedLayout(left, sum(self.lora.groups[-1].ranks), self.weights.W.shape[1])
        self._sum: Tensor | None = None
        self._sum_versions: tuple[int, ...] = ()

    @property
    def is_fp8(self) -> bool:
        """True if the frozen weights are in FP8."""
        return self.weights.scale is not None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that train: the A and B of each adapter in turn."""
        return self.lora.parameters if self.lora else []

    @property
    def reads_rows(self) -> bool:
        """True if X (and dY) is read as it is, not only in FP8."""
        return self.lora is not None or not self.is_fp8

    def draw_seeds(self) -> Seeds:
        """Return a seed for the dropout of each adapter, if it is on."""
        return self.lora.draw_seeds(self.weights.W.device) if self.lora else None

    def augmented(self, x: Float[Tensor, "rows inputs"]) -> Augmented | None:
        """Return an augmented matrix, still empty, for rows like x; None if the layer does not read one."""
        if self.lora is None or self._layout is None or self.lora.draws or x.dtype != self.weights.W.dtype:
            return None
        return self._layout.empty(x, self.lora.ranks)

    def forward(
        self,
        X: Float[Tensor, "rows inputs"] | None,
        fp8: Fp8Rows | None,
        seeds: Seeds,
        augmented: Augmented | None = None,
    ) -> tuple[Float[Tensor, "rows outputs"], Tensor | None]:
        """Return Y, and XA or the augmented matrix for the backward pass; None without adapters.

        `fp8` is X in FP8, for weights in FP8; X itself is read by other weights and by adapters (`reads_rows`).
        """
        if augmented is not None:
            assert self._layout
            assert self.lora
            copies = self.copies(augmented.X.dtype)
            return self._layout.forward(augmented, self.weights, self.lora, copies), augmented.matrix
        Y = self.weights.forward(X, fp8)
        if self.lora is None:
            return Y, None
        assert X is not None
        A, B = self.copies(X.dtype)
        XA = self.lora.XA(X, A, seeds)
        for columns, ranks, part in zip(self.lora.split_outputs(Y), self.lora.split_ranks(XA), B, strict=True):
            columns.addmm_(ranks, part.T)
        return Y, XA

    def dXA(self, dY: Float[Tensor, "rows outputs"] | None) -> Float[Tensor, "rows ranks"] | None:
        """Return dY (s B), None without adapters."""
        if self.lora is None:
            return None
        assert dY is not None
        return self.lora.dXA(dY)

    def dX(
        self, dY: Float[Tensor, "rows outputs"] | None, fp8: Fp8Rows | None, dXA: Tensor | None, seeds: Seeds
    ) -> Float[Tensor, "rows inputs"]:
        """Return dY W + dXA A. `fp8` is dY times the scales of W's rows in FP8, for weights in FP8."""
        if self.lora is None or dXA is None:
            return self.weights.backward(dY, fp8)
        if not self.is_fp8 and seeds is None and self._sum_is_less_work(len(dXA)):
            assert dY is not None
            return dY @ self._summed()
        return self.lora.add_input_gradient(self.weights.backward(dY, fp8), dXA, seeds)

    def _sum_is_less_work(self, rows: int) -> bool:
        """Return whether adding s B A to W is less work than adding dXA A to the gradients of this many rows."""
        return rows * len(self.parameters) // 2 > len(self.weights.W)

    def _summed(self) -> Float[Tensor, "outputs inputs"]:
        """Return W + s B A.

        For gradients alone. Rounding is then a small and equal part of each row's gradient, as it is in any product
        with W; in the forward pass it would swallow what a young adapter adds to W.
        """
        assert self.lora
        if self._sum is not None and self._sum_versions == self.lora.versions:
            return self._sum
        A, B = self.lora.made
        total = torch.empty_like(self.weights.W) if self._sum is None else self._sum
        heights = [len(part) for part in B]
        parts = A.split([part.shape[1] for part in B])
        for out, W, part, a in zip(total.split(heights), self.weights.W.split(heights), B, parts, strict=True):
            addmm_out(W, part, a, out)
        if self._keeps_sum:
            self._sum, self._sum_versions = total, self.lora.versions
        return total

    def parameter_gradients(
        self, dY: Tensor | None, X: Tensor | None, XA: Tensor | None, dXA: Tensor | None, seeds: Seeds
    ) -> list[Tensor | None]:
        """Return dA and dB of each adapter in turn, for autograd to add (gradients.py); `XA`: see `forward`."""
        if self.lora is None:
            return []
        assert dY is not None
        assert X is not None
        assert XA is not None
        assert dXA is not None
        return self.lora.gradients(dY, X, self._split_ranks(XA), dXA, seeds)

    def _split_ranks(self, XA: Tensor) -> Sequence[Tensor]:
        """Return the columns of each group in XA, or in an augmented matrix."""
        assert self.lora
        if self._layout is None or XA.shape[1] == self.lora.ranks:
            return self.lora.split_ranks(XA)
        return self._layout.split_ranks(XA, self.lora)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make all copies of the adapters as they are now, where a CUDA graph reads them."""
        if self.lora is not None:
            self.copies(dtype)
            if self._keeps_sum and not self.is_fp8 and not self.lora.draws:
                self._summed()

    def copies(self, dtype: torch.dtype) -> Copies:
        """Return the adapters in `dtype`, B in the room next to the frozen weights where there is some."""
        assert self.lora
        return self.lora.copies(dtype, lambda number: self._room(number, dtype))

    def _room(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """Return the room next to the frozen weights for the B of a group, if there is some."""
        assert self.lora
        room = None if self._layout is None else self._layout.room(number, self.weights, self.lora)
        return room if dtype == self.weights.W.dtype else None


def can_fuse(layers: Sequence[Any]) -> bool:
    """Return whether `FusedLinear` computes these layers: frozen, in one kind of storage, all or none with LoRA."""
    bases = [_base(layer) for layer in layers]
    adapted = [isinstance(layer, LoraLinear) for layer in layers]
    kinds = {type(base) for base in bases}
    if kinds not in ({nn.Linear}, {Fp8Linear}) or any(adapted) != all(adapted):
        return False
    if any(weight.requires_grad for base in bases for weight in base.parameters()):
        return False
    if len({base.bias is None for base in bases}) > 1:
        return False
    if all(adapted):
        shared = {id(weights_of(layer)[0]) for layer in layers}
        alike = {(layer.r[ADAPTER], layer.scaling[ADAPTER], dropout_of(layer)) for layer in layers}
        if len(shared) < len(layers) or len(alike) > 1:
            return False  # XTuner's q, k and v share one A
    return len({(base.in_features, next(base.parameters()).dtype) for base in bases}) == 1


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, LoraLinear) else layer
