"""Frozen linear layers that read the same rows, with or without adapters, multiplied as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dianjing.layers.fp8 import Fp8Linear, scaled_product
from dianjing.layers.fused.ops import EightBits, Wide, add_dropped, draw_seeds, dropped, turned
from dianjing.layers.gemm import add_product_over_rows, product_over_rows, sum_with_product
from dianjing.layers.lora import ADAPTER, LoraLinear

Seeds = Int[Tensor, " adapters"] | None
"""Of each adapter's dropout; None without dropout."""
SMALL = 256
"""Ranks, added up, to which adapters side by side are multiplied as one, zeros included: few large products take a GPU
less time than many small ones."""


class Linears:
    """What q, k and v are, or gate and up, or one layer alone: their weights lie one below the other in memory.

    The layers keep their names and weights, which become parts of one. Adapters' weights are fp32 and are multiplied
    in the precision of the rows: they are converted when one of them has changed, by torch's own count of changes.

    With `beside`, B lies in memory beside the frozen weights, and what A makes of the rows beside the rows
    (`Wide`): one product then computes what the layer and its adapter make of them. So for the first layer, whose part
    is on the left, and the second, on the right; of more, the others' is added.

    With `keep`, the sum of weights and adapters that gradients go through is made once for each change of these, not
    for each pack; it takes as much memory as the weights. With `add`, adapters' gradients are added where the adapters
    hold those of packs before, and autograd is told of none; not for work that is recorded, once and for all packs.
    """

    def __init__(
        self, layers: Sequence[nn.Module], *, beside: bool = False, keep: bool = False, add: bool = False
    ) -> None:
        bases: list[Any] = [_base(layer) for layer in layers]
        self._adapted: list[Any] = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self.widths = [base.out_features for base in bases]
        names = ("rows", "scale") if isinstance(bases[0], Fp8Linear) else ("weight",)
        self.has_adapters = bool(self._adapted)
        self.adapters = [weight for layer in self._adapted for weight in _weights(layer)]
        """What learns: each adapter's A and B in turn."""
        self._left = self._right = 0
        self._blocks: list[tuple[list[int], list[int]]] = []
        """Widths and ranks of the adapters whose B are one matrix, along its diagonal."""
        if self._adapted:
            self._rank, self._scaling = self._adapted[0].r[ADAPTER], self._adapted[0].scaling[ADAPTER]
            self._share = _share(self._adapted[0])
            ranks = [self._rank] * len(self.widths)
            one_by_one = [([width], [self._rank]) for width in self.widths]
            self._blocks = [(self.widths, ranks)] if sum(ranks) <= SMALL else one_by_one
            if beside and len(names) == 1:
                self._left = self._rank if len(self._blocks) > 1 else 0
                self._right = sum(self._blocks[-1][1])
        self._parameters: list[nn.Parameter] = [getattr(base, names[0]) for base in bases]
        joined = [_join([getattr(base, name) for base in bases]) for name in names]
        self._weight = joined[0]
        self._beside: list[Tensor] = []
        """The frozen weights of the first and the second block with, beside them, what B of these are converted to."""
        self.scale: Tensor | None = joined[1].flatten() if len(joined) > 1 else None
        """Of each column of the result, if the weights are FP8."""
        self._bias = _join([base.bias for base in bases]) if bases[0].bias is not None else None
        self._converted: tuple[Tensor, list[Tensor]] | None = None
        """All A, one below the other, and each B, times the adapters' scale; small ones along the diagonal of one."""
        self._versions: tuple[int, ...] = ()
        self._keep, self._add = keep, add
        self._sum: Tensor | None = None
        """The frozen weights and what the adapters add to them, if it is kept; made when these had `_sum_versions`."""
        self._sum_versions: tuple[int, ...] = ()
        self._ones: Tensor | None = None
        self.eight = self.scale is not None
        """Whether the weights are FP8."""

    @property
    def draws(self) -> bool:
        """Whether adapters drop some of their inputs."""
        return self.has_adapters and self._share > 0 and self._adapted[0].training

    def draw_seeds(self) -> Seeds:
        """Return a seed for the dropout of each adapter, if there is any."""
        return draw_seeds(len(self._adapted), self._weight.device) if self.draws else None

    def room_for(self, x: Float[Tensor, "rows inputs"]) -> Wide | None:
        """Return room for rows like x that leaves some beside them, or None where none is needed."""
        if not self._right or self.draws or x.dtype != self._weight.dtype:
            return None
        inputs, ranks = self._weight.shape[1], self._rank * len(self._adapted)
        return Wide(x.new_empty(len(x), inputs + ranks), self._left, inputs)

    def forward(
        self, x: Float[Tensor, "rows inputs"] | None, eight: EightBits | None, seeds: Seeds, wide: Wide | None = None
    ) -> tuple[Float[Tensor, "rows outputs"], Tensor | None]:
        """Return the layers' results side by side, and what the adapters made of x half-way, for the backward pass.

        `eight` is x in FP8, for weights that are; x itself is read by bf16 weights and by adapters. `wide` is what
        `room_for` returned, with x in it.
        """
        if wide is not None:
            return self._forward_beside(wide), wide.whole
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
            columns.addmm_(ranks, up.T)
        return result, inner

    def _forward_beside(self, wide: Wide) -> Tensor:
        """Return the results; what A makes of x goes beside it."""
        x, whole = wide.rows, wide.whole
        end = self._left + wide.columns
        down, ups = self.convert(x.dtype)
        if self._left:
            torch.mm(x, down[: self._left].T, out=whole[:, : self._left])
        torch.mm(x, down[self._left :].T, out=whole[:, end:])
        result = x.new_empty(len(x), len(self._weight))
        heights = [len(up) for up in ups]
        biases = [None] * len(ups) if self._bias is None else self._bias.split(heights)
        matrices = [*self._beside, *self._weight.split(heights)[len(self._beside) :]]
        # The first block's ranks are on the left; of one block alone, and of the second, on the right.
        spans = [slice(0, end)] if self._left else []
        spans.append(slice(self._left, end + self._right))
        for number, (columns, ranks, up) in enumerate(zip(*self._in_blocks(result, whole), ups, strict=True)):
            span = spans[number] if number < len(spans) else slice(self._left, end)
            rows, matrix, bias = whole[:, span], matrices[number], biases[number]
            if bias is None:
                torch.mm(rows, matrix.T, out=columns)
            else:
                torch.addmm(bias, rows, matrix.T, out=columns)
            if number >= len(spans):
                columns.addmm_(ranks, up.T)
        return result

    def backward_inner(self, gradient: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows ranks"] | None:
        """Return the gradient of what the adapters made half-way."""
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
            if to_inner is not None and seeds is None and self._is_less_work(len(gradient)):
                return gradient @ self._with_adapters()
            result = gradient @ self._weight
        if to_inner is None:
            return result
        assert self._converted
        down, _ = self._converted
        if seeds is None:
            return result.addmm_(to_inner, down)
        parts = result.new_empty(len(seeds), *result.shape)
        for part, ranks, rows in zip(parts, *self._of_adapters(to_inner, down), strict=True):
            torch.mm(ranks, rows, out=part)
        add_dropped(result, parts, seeds, self._share)
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
        if self._sum is not None and self._sum_versions == self._versions:
            return self._sum
        down, ups = self._converted
        result = torch.empty_like(self._weight) if self._sum is None else self._sum
        heights = [len(up) for up in ups]
        downs = down.split([up.shape[1] for up in ups])
        for target, rows, up, part in zip(result.split(heights), self._weight.split(heights), ups, downs, strict=True):
            sum_with_product(rows, up, part, target)
        if self._keep:
            self._sum, self._sum_versions = result, self._versions
        return result

    def backward_adapters(
        self,
        gradient: Float[Tensor, "rows outputs"],
        x: Float[Tensor, "rows inputs"],
        inner: Float[Tensor, "rows ranks"],
        to_inner: Float[Tensor, "rows ranks"],
        seeds: Seeds,
    ) -> list[Tensor | None]:
        """Return the gradients of `adapters`, in fp32; None for one that has been added to what its weight holds."""
        downs, ups = self.adapters[0::2], self.adapters[1::2]
        to_ups: list[Tensor | None] = []
        for columns, ranks, (widths, sizes) in zip(*self._in_blocks(gradient, inner), self._blocks, strict=True):
            if len(widths) == 1:
                to_ups += self._gradients([ups[len(to_ups)]], columns, ranks, self._scaling)
            else:
                to_ups += _diagonal(product_over_rows(columns, ranks, self._scaling), widths, sizes)
        if seeds is None:
            to_downs = self._gradients(downs, to_inner, x, 1.0)
        else:
            columns, entering = to_inner.split(self._rank, dim=1), dropped(x, seeds, self._share)
            to_downs = [
                found
                for down, ranks, rows in zip(downs, columns, entering, strict=True)
                for found in self._gradients([down], ranks, rows, 1.0)
            ]
        return [gradient for pair in zip(to_downs, to_ups, strict=True) for gradient in pair]

    def _gradients(self, weights: Sequence[nn.Parameter], a: Tensor, b: Tensor, scale: float) -> list[Tensor | None]:
        """Return scale * a.T @ b, cut into the gradients of weights, or add it to what they hold."""
        held = _held(weights) if self._add else None
        if held is None:
            return [*product_over_rows(a, b, scale).split([len(weight) for weight in weights])]
        add_product_over_rows(a, b, scale, held)
        return [None] * len(weights)

    def _in_blocks(self, result: Tensor, inner: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the columns of results, and of what is half-way (in something wide or not), of each block."""
        sizes = [sum(ranks) for _, ranks in self._blocks]
        if inner.shape[1] == sum(sizes):
            parts: Sequence[Tensor] = inner.split(sizes, dim=1)
        else:
            inputs = self._weight.shape[1]
            before, after = (sizes[:1], sizes[1:]) if self._left else ([], sizes)
            parts = inner.split([*before, inputs, *after], dim=1)
            parts = [*parts[: len(before)], *parts[len(before) + 1 :]]
        return result.split([sum(widths) for widths, _ in self._blocks], dim=1), parts

    def _inner(self, x: Tensor, down: Tensor, seeds: Seeds) -> Tensor:
        if seeds is None:
            return x @ down.T
        result = x.new_empty(len(x), len(down))
        for rows, ranks, part in zip(dropped(x, seeds, self._share), *self._of_adapters(result, down), strict=True):
            torch.mm(rows, part.T, out=ranks)
        return result

    def _of_adapters(self, inner: Tensor, down: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the columns of what is half-way, and the A, of each adapter."""
        return inner.split(self._rank, dim=1), down.split(self._rank)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make all that is made of the adapters, as they are now, where recorded work reads it."""
        if self.has_adapters:
            self.convert(dtype)
            if self._keep and self.scale is None and not self.draws:
                self._with_adapters()

    def convert(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Return all A, one below the other, and the blocks of B, as they are now; they keep their place in memory."""
        versions = tuple(weight._version for weight in self.adapters)
        held = self._converted
        if held is not None and held[0].dtype == dtype and versions == self._versions:
            return held
        downs, ups = self.adapters[0::2], self.adapters[1::2]
        if held is None or held[0].dtype != dtype:
            with torch.inference_mode(False):  # a sample answer may be the first to ask, training changes them later
                if self._right and not self._beside:
                    self._lay_beside()
                held = (
                    torch.empty(len(downs) * self._rank, downs[0].shape[1], dtype=dtype, device=downs[0].device),
                    [self._room_of_block(number, dtype) for number in range(len(self._blocks))],
                )
        targets = [
            part for block, sizes in zip(held[1], self._blocks, strict=True) for part in _diagonal(block, *sizes)
        ]
        with torch.no_grad():
            scaled = [up if self._scaling == 1 else up * self._scaling for up in ups]
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] (torch has no public one)
                [*held[0].split(self._rank), *targets], [*downs, *scaled]
            )
        self._converted, self._versions = held, versions
        return held

    def _lay_beside(self) -> None:
        """Move the frozen weights to where there is room for B beside them.

        Not before the first pass: until then engines send each weight to all ranks, as one piece of memory.

        Of a row there is room for one B alone. The first block's lie before its rows; the second's behind, where rows
        that follow have room for theirs, which they do not need.
        """
        rows, columns = self._weight.shape
        ranks = max(self._left, self._right)
        wide = ranks + columns
        memory = self._weight.new_zeros(rows * wide + ranks)
        self._weight = memory.as_strided((rows, columns), (wide, 1), ranks).copy_(self._weight)
        for parameter, part in zip(self._parameters, self._weight.split(self.widths), strict=True):
            parameter.data = part
        heights = [sum(widths) for widths, _ in self._blocks]
        if self._left:
            self._beside = [memory.as_strided((heights[0], wide), (wide, 1), 0)]
        before = heights[0] if self._left else 0
        height = heights[len(self._beside)]
        self._beside.append(memory.as_strided((height, columns + self._right), (wide, 1), before * wide + ranks))

    def _room_of_block(self, number: int, dtype: torch.dtype) -> Tensor:
        """Return where the B of a block are converted to: beside its frozen weights, if there is room."""
        widths, sizes = self._blocks[number]
        ranks = sum(sizes)
        if number < len(self._beside) and dtype == self._weight.dtype:
            rows = self._beside[number]
            return rows[:, :ranks] if self._left and number == 0 else rows[:, -ranks:]
        return torch.zeros(sum(widths), ranks, dtype=dtype, device=self._weight.device)


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


def _held(weights: Sequence[nn.Parameter]) -> Tensor | None:
    """Return the gradients that weights hold, if they lie one below the other in memory, as those of a product do."""
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
