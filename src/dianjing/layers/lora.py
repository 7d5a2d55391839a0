"""A LoRA layer that computes what peft's does, in fewer passes over memory."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from dianjing.layers.fp8 import Fp8Linear, by_columns, quantized
from dianjing.layers.gemm import product_over_rows, sum_of_fp8_products, sum_of_products

ADAPTER = "default"


class LoraLinear(PeftLinear):
    """peft's LoRA on a frozen linear layer of any storage; adapters are fp32 and compute in the input's precision.

    In fp32 and without dropout it multiplies many rows with weight + scale * B @ A: one product instead of three.
    In bf16 that sum would round the adapter away (a new adapter is far smaller than the weight).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for inputs of any leading shape."""
        base, dropout = self.base_layer, self.lora_dropout[ADAPTER]
        down: Any = self.lora_A[ADAPTER].weight
        up: Any = self.lora_B[ADAPTER].weight
        scale = self.scaling[ADAPTER]
        partitioned = hasattr(down, "ds_id")  # by ZeRO-3, which gathers a weight when its own module is called
        if partitioned or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if self._may_sum(x):
            return _Summed.apply(x, base.weight, base.bias, down, up, scale)
        dropped = dropout(x) if self._drops() else None
        if held := _held(base, x):
            return adapted(x, dropped, *held, down, up, scale)
        result = base(x)
        inner = linear((x if dropped is None else dropped).to(result.dtype), down.to(result.dtype))
        # One pass over the result: the product is added where it is made.
        rows, inner_rows = result.reshape(-1, result.shape[-1]), inner.reshape(-1, inner.shape[-1])
        return torch.addmm(rows, inner_rows, up.to(result.dtype).T, alpha=scale).view(result.shape)

    def _drops(self) -> bool:
        return self.training and getattr(self.lora_dropout[ADAPTER], "p", 0.0) > 0

    def _may_sum(self, x: Tensor) -> bool:
        """Whether one fp32 product will do; a few words of an answer do not pay for the sum of the weights."""
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or not weight.dtype == x.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False
        return not self._drops() and (torch.is_grad_enabled() or 2 * x[..., 0].numel() > min(weight.shape))


def _held(base: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Return a layer's weight, the scales of its rows if it is FP8, and its bias; None if it must be called."""
    if torch.is_autocast_enabled(x.device.type):
        return None
    if type(base) is Fp8Linear:
        return base.rows, base.scale, base.bias
    return (base.weight, None, base.bias) if type(base) is nn.Linear and base.weight.dtype == x.dtype else None


def adapted(
    x: Float[Tensor, "*rows inputs"],
    dropped: Float[Tensor, "*rows inputs"] | None,
    weight: Float[Tensor, "outputs inputs"],
    row_scale: Float[Tensor, "outputs 1"] | None,
    bias: Float[Tensor, " outputs"] | None,
    down: Float[Tensor, "rank inputs"],
    up: Float[Tensor, "outputs rank"],
    scale: float,
) -> Float[Tensor, "*rows outputs"]:
    """Return x @ weight.T + bias + scale * (dropped @ down.T) @ up.T, where only down and up learn.

    `dropped` is what dropout has left of x, None without dropout; with `row_scale`, `weight` is FP8.
    """
    return cast(Tensor, _Adapted.apply(x, dropped, weight, row_scale, bias, down, up, scale))


class _Adapted(torch.autograd.Function):
    """`adapted`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        entering = rows if dropped is None else dropped.reshape(rows.shape)
        down, up = down.to(x.dtype), up.to(x.dtype)
        inner = entering @ down.T
        ctx.save_for_backward(entering, inner, weight, row_scale, down, up)
        ctx.scale, ctx.drops = scale, dropped is not None
        if row_scale is None:
            result = sum_of_products(rows, weight.T, inner, up.T, scale, bias)
        else:
            eight_bits, scales = quantized(rows)
            columns = row_scale.T.contiguous()
            result = sum_of_fp8_products(eight_bits, scales, weight.T, columns, inner, up.T, scale)
            result = result if bias is None else result + bias
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        entering, inner, weight, row_scale, down, up = ctx.saved_tensors
        shape = *gradient.shape[:-1], down.shape[1]
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_inner = rows @ up
        to_down = product_over_rows(to_inner, entering, ctx.scale)
        to_up = product_over_rows(rows, inner, ctx.scale)
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, None, None, to_down, to_up, None
        to_dropped = (to_inner @ down * ctx.scale).view(shape) if ctx.drops else None
        # With dropout, what comes back through the adapter is another tensor's.
        beside = (to_inner[:, :0], down[:0]) if ctx.drops else (to_inner, down)
        if row_scale is None:
            to_x = sum_of_products(rows, weight, *beside, ctx.scale)
        else:
            eight_bits, scales = quantized(rows * row_scale.T)
            ones = torch.ones_like(weight[:1], dtype=torch.float32)
            to_x = sum_of_fp8_products(eight_bits, scales, by_columns(weight), ones, *beside, ctx.scale)
        return to_x.view(shape), to_dropped, None, None, None, to_down, to_up, None


class _Summed(torch.autograd.Function):
    """x @ (weight + scale * up @ down).T + bias, where down and up learn and weight and bias do not."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Float[Tensor, "*rows inputs"],
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None,
        down: Float[Tensor, "rank inputs"],
        up: Float[Tensor, "outputs rank"],
        scale: float,
    ) -> Float[Tensor, "*rows outputs"]:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*rows outputs"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, down, up = ctx.saved_tensors
        flat, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        # The sum is made again: keeping it would hold a second copy of all weights.
        to_x = gradient @ torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        to_down = ((flat @ up) * ctx.scale).T @ inputs
        to_up = flat.T @ ((inputs @ down.T) * ctx.scale)
        return to_x, None, None, to_down, to_up, None
