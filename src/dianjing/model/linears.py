"""Frozen linear layers that read the same rows, with or without adapters, multiplied as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dianjing.model.fp8 import Fp8Linear, scaled_product
from dianjing.model.lora import ADAPTER, LoraLinear
from dianjing.model.passes import EightBits, add_dropped, draw_seed, dropped, turned
from dianjing.model.products import product_over_rows

Seeds = tuple[int, ...]
"""Of each adapter's dropout; empty without dropout."""
SMALL = 256
"""Ranks, added up, to which adapters side by side are multiplied as one, zeros included: few large products take a GPU
less time than many small ones."""


class Linears:
    """What q, k and v are, or gate and up, or one layer alone: their weights lie one below the other in memory.

    The layers keep their names and weights, which become parts of one. Adapters' weights are fp32 and are multiplied
    in the precision of the rows: they are converted when one of them has changed, by torch's own count of changes.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        bases: list[Any] = [_base(layer) for layer in layers]
        self._adapted: list[Any] = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self.widths = [base.out_features for base in bases]
        names = ("rows", "scale") if isinstance(bases[0], Fp8Linear) else ("weight",)
        joined = [_join([getattr(base, name) for base in bases]) for name in names]
        self._weight = joined[0]
        self.scale: Tensor | None = joined[1].flatten() if len(joined) > 1 else None
        """Of each column of the result, if the weights are FP8."""
        self._bias = _join([base.bias for base in bases]) if bases[0].bias is not None else None
        self._converted: tuple[Tensor, list[Tensor]] | None = None
        """All A, one below the other, and each B; small ones along the diagonal of one."""
        self._versions: tuple[int, ...] = ()
        self._ones: Tensor | None = None
        self.eight = self.scale is not None
        """Whether the weights are FP8."""
        self.has_adapters = bool(self._adapted)
        self.adapters = [weight for layer in self._adapted for weight in _weights(layer)]
        """What learns: each adapter's A and B in turn."""
        if self._adapted:
            self._rank, self._scaling = self._adapted[0].r[ADAPTER], self._adapted[0].scaling[ADAPTER]
            self._share = _share(self._adapted[0])
            ranks = [self._rank] * len(self.widths)
            one_by_one = [([width], [self._rank]) for width in self.widths]
            self._blocks = [(self.widths, ranks)] if sum(ranks) <= SMALL else one_by_one

    @property
    def draws(self) -> bool:
        """Whether adapters drop some of their inputs."""
        return self.has_adapters and self._share > 0 and self._adapted[0].training

    def draw_seeds(self) -> Seeds:
        """Return a seed for the dropout of each adapter, if there is any."""
        return tuple(draw_seed() for _ in self._adapted) if self.draws else ()

    def forward(
        self, x: Float[Tensor, "rows inputs"] | None, eight: EightBits | None, seeds: Seeds
    ) -> tuple[Float[Tensor, "rows outputs"], Float[Tensor, "rows ranks"] | None]:
        """Return the layers' results side by side, and what the adapters made of x half-way.

        `eight` is x in FP8, for weights that are; x itself is read by bf16 weights and by adapters.
        """
        if self.scale is not None:
            assert eight is not None
            dtype = torch.bfloat16 if x is None else x.dtype
            result = scaled_product(*eight, self._weight.T, self.scale[None], dtype)
            if self._bias is not None:
                result += self._bias
        else:
            assert x is not None
            result = x @ self._weight.T if self._bias is None else torch.addmm(self._bias, x, self._weight.T)
        if not self._adapted:
            return result, None
        assert x is not None
        down, ups = self.convert(x.dtype)
        inner = self._inner(x, down, seeds)
        for columns, ranks, up in zip(*self._in_blocks(result, inner), ups, strict=True):
            columns.addmm_(ranks, up.T, alpha=self._scaling)
        return result, inner

    def backward_inner(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows ranks"] | None:
        """Return the gradient of what the adapters made half-way, not yet times their scale."""
        if not self._adapted:
            return None
        assert self._converted
        _, ups = self._converted
        if len(ups) == 1:
            return gradient @ ups[0]
        result = gradient.new_empty(len(gradient), sum(up.shape[1] for up in ups))
        for columns, ranks, up in zip(*self._in_blocks(gradient, result), ups, strict=True):
            torch.mm(columns, up, out=ranks)
        return result

    def backward_input(
        self, gradient: Tensor | None, eight: EightBits | None, to_inner: Tensor | None, seeds: Seeds
    ) -> Float[Tensor, "rows inputs"]:
        """Return the gradient of x. With FP8 weights `eight` is the gradient of the result, times `scale`."""
        if self.scale is not None:
            assert eight is not None
            dtype = torch.bfloat16 if gradient is None else gradient.dtype
            if self._ones is None:
                self._ones = self.scale.new_ones(1, self._weight.shape[1])
            result = scaled_product(*eight, turned(self._weight), self._ones, dtype)
        else:
            assert gradient is not None
            if to_inner is not None and not seeds and self._is_less_work(len(gradient)):
                return gradient @ self._with_adapters()
            result = gradient @ self._weight
        if to_inner is None:
            return result
        assert self._converted
        down, _ = self._converted
        if not seeds:
            return result.addmm_(to_inner, down, alpha=self._scaling)
        for ranks, part, seed in zip(self._ranks(to_inner), down.split(self._rank), seeds, strict=True):
            add_dropped(result, (ranks @ part).mul_(self._scaling), seed, self._share)
        return result

    def _is_less_work(self, rows: int) -> bool:
        """Return whether adding adapters to the weights is less work than adding their share to so many gradients."""
        return rows * len(self._adapted) > len(self._weight)

    def _with_adapters(self) -> Float[Tensor, "outputs inputs"]:
        """Return the frozen weights and what the adapters add to them.

        For gradients alone. Rounding is then a small and equal part of each row's gradient, as it is in any product of
        these weights; in the forward pass a young adapter's share of the result would be lost in it.
        """
        assert self._converted
        down, ups = self._converted
        result = torch.empty_like(self._weight)
        heights = [len(up) for up in ups]
        downs = down.split([up.shape[1] for up in ups])
        for target, rows, up, part in zip(result.split(heights), self._weight.split(heights), ups, downs, strict=True):
            torch.addmm(rows, up, part, alpha=self._scaling, out=target)
        return result

    def backward_adapters(
        self,
        gradient: Float[Tensor, "rows outputs"],
        x: Float[Tensor, "rows inputs"],
        inner: Float[Tensor, "rows ranks"],
        to_inner: Float[Tensor, "rows ranks"],
        seeds: Seeds,
    ) -> list[Tensor]:
        """Return the gradients of `adapters`, in fp32."""
        to_ups = [
            block
            for columns, ranks, (widths, sizes) in zip(*self._in_blocks(gradient, inner), self._blocks, strict=True)
            for block in _diagonal(product_over_rows(columns, ranks, self._scaling), widths, sizes)
        ]
        if seeds:
            to_downs = [
                product_over_rows(ranks, dropped(x, seed, self._share), self._scaling)
                for ranks, seed in zip(self._ranks(to_inner), seeds, strict=True)
            ]
        else:
            to_downs = product_over_rows(to_inner, x, self._scaling).split(self._rank)
        return [gradient for pair in zip(to_downs, to_ups, strict=True) for gradient in pair]

    def _in_blocks(self, result: Tensor, inner: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the columns of results, and of what is half-way, that belong to each block of adapters."""
        if len(self._blocks) == 1:
            return [result], [inner]
        return result.split(self.widths, dim=1), self._ranks(inner)

    def _ranks(self, inner: Tensor) -> tuple[Tensor, ...]:
        return inner.split(self._rank, dim=1)

    def _inner(self, x: Tensor, down: Tensor, seeds: Seeds) -> Tensor:
        if not seeds:
            return x @ down.T
        result = x.new_empty(len(x), len(down))
        for ranks, part, seed in zip(self._ranks(result), down.split(self._rank), seeds, strict=True):
            torch.mm(dropped(x, seed, self._share), part.T, out=ranks)
        return result

    def convert(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Return all A, one below the other, and the blocks of B, as they are now; they keep their place in memory."""
        versions = tuple(weight._version for weight in self.adapters)
        held = self._converted
        if held is not None and held[0].dtype == dtype and versions == self._versions:
            return held
        downs, ups = self.adapters[0::2], self.adapters[1::2]
        if held is None or held[0].dtype != dtype:
            settings: Any = {"dtype": dtype, "device": downs[0].device}
            with torch.inference_mode(False):  # a sample answer may be the first to ask, training changes them later
                blocks = [torch.zeros(sum(widths), sum(ranks), **settings) for widths, ranks in self._blocks]
                held = torch.empty(len(downs) * self._rank, downs[0].shape[1], **settings), blocks
        targets = [
            part for block, sizes in zip(held[1], self._blocks, strict=True) for part in _diagonal(block, *sizes)
        ]
        with torch.no_grad():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] (torch has no public one)
                [*held[0].split(self._rank), *targets], [*downs, *ups]
            )
        self._converted, self._versions = held, versions
        return held


def joinable(layers: Sequence[Any]) -> bool:
    """Return whether `Linears` computes what these layers do: frozen, of one storage, all or none with an adapter."""
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
        downs = {id(_weights(layer)[0]) for layer in layers}
        alike = {(layer.r[ADAPTER], layer.scaling[ADAPTER], _share(layer)) for layer in layers}
        if len(downs) < len(layers) or len(alike) > 1:
            return False  # XTuner's q, k and v share one A
    return len({(base.in_features, next(base.parameters()).dtype) for base in bases}) == 1


def _diagonal(block: Tensor, heights: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """Return the parts of a matrix along its diagonal."""
    rows = block.split(list(heights))
    return [part.split(list(widths), dim=1)[place] for place, part in enumerate(rows)]


def _base(layer: Any) -> Any:
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def _weights(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _share(layer: Any) -> float:
    """Return the share of its inputs that an adapter drops in training."""
    return float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0))


def _join(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return parameters one below the other; each becomes a part of it."""
    if len(parameters) == 1:
        return parameters[0].detach()
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joined.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return joined
