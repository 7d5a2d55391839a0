"""A LoRA layer that computes what peft's does, in fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.nn.functional import linear

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
        result = base(x)
        inner = linear(dropout(x).to(result.dtype), down.to(result.dtype))
        # One pass over the result: the product is added where it is made.
        rows, inner_rows = result.reshape(-1, result.shape[-1]), inner.reshape(-1, inner.shape[-1])
        return torch.addmm(rows, inner_rows, up.to(result.dtype).T, alpha=scale).view(result.shape)

    def _may_sum(self, x: Tensor) -> bool:
        """Whether one fp32 product will do; a few words of an answer do not pay for the sum of the weights."""
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or not weight.dtype == x.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False
        dropping = self.training and getattr(self.lora_dropout[ADAPTER], "p", 0.0) > 0
        return not dropping and (torch.is_grad_enabled() or 2 * x[..., 0].numel() > min(weight.shape))


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
