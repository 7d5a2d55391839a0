"""A LoRA layer that computes one product where peft computes three; the numbers are the same."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor
from torch.nn.functional import linear

ADAPTER = "default"


class LoraLinear(PeftLinear):
    """peft's LoRA on a linear layer; in fp32 and without dropout it multiplies with weight + scale * B @ A.

    In bf16 the sum would round the adapter away (a new adapter is far smaller than the weight), and with dropout the
    adapter has another input than the weight: then it computes as peft does.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for inputs of any leading shape."""
        base, dropout = self.base_layer, self.lora_dropout[ADAPTER]
        down, up = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        dropping = self.training and getattr(dropout, "p", 0.0) > 0
        in_fp32 = base.weight.dtype == x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        partitioned = hasattr(base.weight, "ds_id")  # by ZeRO-3, which gathers a weight when its own module is called
        if dropping or partitioned or not in_fp32 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return _Summed.apply(x, base.weight, base.bias, down, up, self.scaling[ADAPTER])


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
