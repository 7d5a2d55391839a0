"""The LoRA adapters of fused linear layers: their copies in the precision of X, and their GEMMs both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dianjing.layers.fused.gradients import weight_gradients
from dianjing.layers.fused.ops import Seeds, add_dropout, draw_seeds, dropout
from dianjing.layers.gemm import gemm_tn
from dianjing.layers.lora import ADAPTER, LoraLinear

SMALL = 256
"""Ranks, added up, to which adapters are multiplied as one block-diagonal B, zeros included: a GPU takes less time for
few large GEMMs than for many small ones."""


class Group(NamedTuple):
    """Adapters whose B form one block-diagonal matrix: the widths and ranks of its blocks."""

    widths: list[int]
    ranks: list[int]


class Copies(NamedTuple):
    """A and B in the precision of X."""

    A: Float[Tensor, "ranks inputs"]
    """All A, stacked."""
    B: list[Tensor]
    """s B of each group, (widths, ranks)."""


class LoraAdapters:
    """Adapters A, B of layers with the same input X, all of one rank r, scale s and dropout p.

    Forward: XA = D A', Y += XA (s B)'. Backward: dXA = dY (s B), dX += dXA A, dA = dXA' D, dB = s dY' XA. Here D is X
    after the dropout of each adapter, or X itself. XA has the r columns of each adapter in turn.
    """

    def __init__(self, layers: Sequence[Any], *, accumulate: bool) -> None:
        self._layers = layers
        self._accumulate = accumulate
        self.rank, self._scale, self._p = layers[0].r[ADAPTER], layers[0].scaling[ADAPTER], dropout_of(layers[0])
        self.parameters = [weight for layer in layers for weight in weights_of(layer)]
        """The A and B of each adapter in turn."""
        self._A, self._B = self.parameters[0::2], self.parameters[1::2]
        widths, ranks = [len(B) for B in self._B], [self.rank] * len(layers)
        self.ranks = sum(ranks)
        """Of all adapters, added up: columns of XA."""
        one_by_one = [Group([width], [self.rank]) for width in widths]
        self.groups = [Group(widths, ranks)] if self.ranks <= SMALL else one_by_one
        self._copies: Copies | None = None
        self.versions: tuple[int, ...] = ()
        """Of the parameters when the copies were made."""

    @property
    def draws(self) -> bool:
        """True if dropout is on."""
        return self._p > 0 and self._layers[0].training

    def draw_seeds(self, device: torch.device) -> Seeds:
        """Return a seed for the dropout of each adapter, if it is on."""
        return draw_seeds(len(self._layers), device) if self.draws else None

    def copies(self, dtype: torch.dtype, room: Callable[[int], Tensor | None]) -> Copies:
        """Return A and B as they are now; they keep their place in memory, so that CUDA graphs may read them.

        `room` says where a group's copy of B goes, if not into memory of its own.
        """
        versions = versions_of(self.parameters)
        held = self._copies
        if held is not None and held.A.dtype == dtype and versions == self.versions:
            return held
        if held is None or held.A.dtype != dtype:
            with torch.inference_mode(False):  # a sample answer may be the first to ask, training changes them later
                held = self._allocate(dtype, room)
        blocks = [part for B, group in zip(held.B, self.groups, strict=True) for part in diagonal(B, group)]
        with torch.no_grad():
            scaled = [B if self._scale == 1 else B * self._scale for B in self._B]
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] (torch has no public one)
                [*held.A.split(self.rank), *blocks], [*self._A, *scaled]
            )
        self._copies, self.versions = held, versions
        return held

    def _allocate(self, dtype: torch.dtype, room: Callable[[int], Tensor | None]) -> Copies:
        like = self._A[0]
        A = torch.empty(self.ranks, like.shape[1], dtype=dtype, device=like.device)
        B = []
        for number, group in enumerate(self.groups):
            place = room(number)
            if place is None:
                place = torch.zeros(sum(group.widths), sum(group.ranks), dtype=dtype, device=like.device)
            B.append(place)
        return Copies(A, B)

    @property
    def made(self) -> Copies:
        """The copies that the forward pass has made."""
        assert self._copies
        return self._copies

    def XA(self, X: Float[Tensor, "rows inputs"], A: Tensor, seeds: Seeds) -> Float[Tensor, "rows ranks"]:
        """Return D A'."""
        if seeds is None:
            return X @ A.T
        XA = X.new_empty(len(X), len(A))
        for D, columns, part in zip(dropout(X, seeds, self._p), *self._by_adapter(XA, A), strict=True):
            torch.mm(D, part.T, out=columns)
        return XA

    def dXA(self, dY: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows ranks"]:
        """Return dY (s B)."""
        B = self.made.B
        if len(B) == 1:
            return dY @ B[0]
        dXA = dY.new_empty(len(dY), self.ranks)
        for rows, columns, part in zip(self.split_outputs(dY), self.split_ranks(dXA), B, strict=True):
            torch.mm(rows, part, out=columns)
        return dXA

    def add_input_gradient(self, dX: Tensor, dXA: Tensor, seeds: Seeds) -> Tensor:
        """Add dXA A to dX in place, each adapter's part through its dropout, and return dX."""
        if seeds is None:
            return dX.addmm_(dXA, self.made.A)
        parts = dX.new_empty(len(seeds), *dX.shape)
        for part, columns, A in zip(parts, *self._by_adapter(dXA, self.made.A), strict=True):
            torch.mm(columns, A, out=part)
        add_dropout(dX, parts, seeds, self._p)
        return dX

    def gradients(self, dY: Tensor, X: Tensor, XA: Sequence[Tensor], dXA: Tensor, seeds: Seeds) -> list[Tensor | None]:
        """Return the gradients of `parameters` in fp32, None where one was added in place (gradients.py).

        `XA` are the columns of each group.
        """
        dB: list[Tensor | None] = []
        for rows, columns, group in zip(self.split_outputs(dY), XA, self.groups, strict=True):
            if len(group.widths) == 1:
                dB += weight_gradients([self._B[len(dB)]], rows, columns, self._scale, accumulate=self._accumulate)
            else:
                dB += diagonal(gemm_tn(rows, columns, self._scale), group)
        if seeds is None:
            dA = weight_gradients(self._A, dXA, X, 1.0, accumulate=self._accumulate)
        else:
            dA = []
            for A, columns, D in zip(self._A, dXA.split(self.rank, dim=1), dropout(X, seeds, self._p), strict=True):
                dA += weight_gradients([A], columns, D, 1.0, accumulate=self._accumulate)
        return [gradient for pair in zip(dA, dB, strict=True) for gradient in pair]

    def split_outputs(self, Y: Tensor) -> Sequence[Tensor]:
        """Return the columns of Y of each group."""
        return Y.split([sum(group.widths) for group in self.groups], dim=1)

    def split_ranks(self, XA: Tensor) -> Sequence[Tensor]:
        """Return the columns of XA of each group."""
        return XA.split([sum(group.ranks) for group in self.groups], dim=1)

    def _by_adapter(self, XA: Tensor, A: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return XA.split(self.rank, dim=1), A.split(self.rank)


def versions_of(weights: Sequence[nn.Parameter]) -> tuple[int, ...]:
    """Return how often each weight has been changed in place: copies made at another count are stale.

    torch's counter is private, but nothing public tells of a change that some other code has made, and a count of our
    own would miss all that do not know of it (an optimizer, a loaded checkpoint, a test). Fused optimizers do not count
    their changes; the engines do it for them (train/engine.py).
    """
    return tuple(weight._version for weight in weights)


def diagonal(B: Tensor, group: Group) -> list[Tensor]:
    """Return the blocks of a block-diagonal matrix."""
    rows = B.split(group.widths)
    return [part.split(group.ranks, dim=1)[place] for place, part in enumerate(rows)]


def weights_of(layer: LoraLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a layer's adapter."""
    A: Any = layer.lora_A[ADAPTER].weight
    B: Any = layer.lora_B[ADAPTER].weight
    return A, B


def dropout_of(layer: Any) -> float:
    """Return the dropout of a layer's adapter."""
    return float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0))
