"""LoRA on one linear layer: what peft computes, in fewer passes over memory. fused/linear.py fuses several.

Y  = X W' + b + s (D A') B'         D is X after dropout, or X itself
dX = dY W + s (dY B) A              without dropout; with it the second part is the gradient of D
dA = s (dY B)' D                    in fp32, summed over all rows
dB = s dY' (D A')
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from dianjing.layers.fp8 import Fp8Linear, column_major, quantize
from dianjing.layers.gemm import gemm_tn, two_gemms, two_gemms_fp8

ADAPTER = "default"


class LoraLinear(PeftLinear):
    """peft's LoRA layer on a frozen linear layer in any storage; A and B are fp32 and compute in the input's precision.

    In fp32 and without dropout many rows are multiplied by W + s B A: one GEMM instead of three. In bf16 that sum would
    round the adapter away (a new adapter is far smaller than the weight).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output for inputs of any leading shape."""
        base, dropout = self.base_layer, self.lora_dropout[ADAPTER]
        A: Any = self.lora_A[ADAPTER].weight
        B: Any = self.lora_B[ADAPTER].weight
        scale = self.scaling[ADAPTER]
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        if self._may_merge(x):
            return _MergedLora.apply(x, base.weight, base.bias, A, B, scale)
        dropped = dropout(x) if self._drops() else None
        if held := _held(base, x):
            return lora_linear(x, dropped, *held, A, B, scale)
        y = base(x)
        XA = linear((x if dropped is None else dropped).to(y.dtype), A.to(y.dtype))
        # One pass over y: the product is added where it is made.
        rows, xa_rows = y.reshape(-1, y.shape[-1]), XA.reshape(-1, XA.shape[-1])
        return torch.addmm(rows, xa_rows, B.to(y.dtype).T, alpha=scale).view(y.shape)

    def _drops(self) -> bool:
        return self.training and getattr(self.lora_dropout[ADAPTER], "p", 0.0) > 0

    def _may_merge(self, x: Tensor) -> bool:
        """Return whether one fp32 GEMM will do; merging the weights does not pay for the few rows of an answer."""
        weight = getattr(self.base_layer, "weight", None)
        if weight is None or not weight.dtype == x.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
            return False
        return not self._drops() and (torch.is_grad_enabled() or 2 * x[..., 0].numel() > min(weight.shape))


def _held(base: Any, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """Return W, the scales of its rows if it is FP8, and the bias; None if the layer must be called as a module."""
    if torch.is_autocast_enabled(x.device.type):
        return None
    if type(base) is Fp8Linear:
        return base.rows, base.scale, base.bias
    return (base.weight, None, base.bias) if type(base) is nn.Linear and base.weight.dtype == x.dtype else None


def lora_linear(
    x: Float[Tensor, "*rows inputs"],
    dropped: Float[Tensor, "*rows inputs"] | None,
    weight: Float[Tensor, "outputs inputs"],
    row_scale: Float[Tensor, "outputs 1"] | None,
    bias: Float[Tensor, " outputs"] | None,
    A: Float[Tensor, "rank inputs"],
    B: Float[Tensor, "outputs rank"],
    scale: float,
) -> Float[Tensor, "*rows outputs"]:
    """Return x @ weight.T + bias + scale * (dropped @ A.T) @ B.T; only A and B get gradients, and x.

    `dropped` is x after dropout, None without dropout; with `row_scale`, `weight` is FP8.
    """
    return cast(Tensor, _LoraLinear.apply(x, dropped, weight, row_scale, bias, A, B, scale))


class _LoraLinear(torch.autograd.Function):
    """Y = X W' + b + s (D A') B'; dX = dY W, dD = s (dY B) A (added to dX if D is X); dA = s (dY B)' D, dB = s dY' XA.

    Keeps D, XA = D A' and the converted A and B. FP8 weights: both GEMMs with W round X, or dY, to FP8.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
    ) -> Tensor:
        X = x.reshape(-1, x.shape[-1])
        D = X if dropped is None else dropped.reshape(X.shape)
        A, B = A.to(x.dtype), B.to(x.dtype)
        XA = D @ A.T
        ctx.save_for_backward(D, XA, weight, row_scale, A, B)
        ctx.scale, ctx.drops = scale, dropped is not None
        if row_scale is None:
            Y = two_gemms(X, weight.T, XA, B.T, scale, bias)
        else:
            Y = two_gemms_fp8(*quantize(X), weight.T, row_scale.T.contiguous(), XA, B.T, scale)
            Y = Y if bias is None else Y + bias
        return Y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        D, XA, weight, row_scale, A, B = ctx.saved_tensors
        shape = *gradient.shape[:-1], A.shape[1]
        dY = gradient.reshape(-1, gradient.shape[-1])
        dXA = dY @ B
        dA = gemm_tn(dXA, D, ctx.scale)
        dB = gemm_tn(dY, XA, ctx.scale)
        if not any(ctx.needs_input_grad[:2]):
            return None, None, None, None, None, dA, dB, None
        dD = (dXA @ A * ctx.scale).view(shape) if ctx.drops else None
        # With dropout the adapter's part belongs to D: nothing of it is added to dX.
        added = (dXA[:, :0], A[:0]) if ctx.drops else (dXA, A)
        if row_scale is None:
            dX = two_gemms(dY, weight, *added, ctx.scale)
        else:
            ones = torch.ones_like(weight[:1], dtype=torch.float32)
            dX = two_gemms_fp8(*quantize(dY * row_scale.T), column_major(weight), ones, *added, ctx.scale)
        return dX.view(shape), dD, None, None, None, dA, dB, None


class _MergedLora(torch.autograd.Function):
    """Y = X (W + s B A)' + b; dX = dY (W + s B A), dA = (s dY B)' X, dB = dY' (s X A').

    Keeps X; the merged weight is made again in the backward pass: keeping it would hold a second copy of all weights.
    Without this form, a step on a CPU in fp32 took 6 % longer (benchmarks/cpu_step.py, rounds of both in turns).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Float[Tensor, "*rows inputs"],
        weight: Float[Tensor, "outputs inputs"],
        bias: Float[Tensor, " outputs"] | None,
        A: Float[Tensor, "rank inputs"],
        B: Float[Tensor, "outputs rank"],
        scale: float,
    ) -> Float[Tensor, "*rows outputs"]:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, B, A, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "*rows outputs"]) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, A, B = ctx.saved_tensors
        dY, X = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        dX = gradient @ torch.addmm(weight, B, A, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        dA = ((dY @ B) * ctx.scale).T @ X
        dB = dY.T @ ((X @ A.T) * ctx.scale)
        return dX, None, None, dA, dB, None
