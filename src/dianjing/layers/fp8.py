"""Frozen linear layers held in 8 bits, multiplied by the GPU's FP8 units forwards and backwards.

One copy of a weight serves both passes: each output row has its scale, which the backward pass folds into the
gradient. What is multiplied with it is rounded to 8 bits too, row by row, each time anew.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor, nn
from transformers import PreTrainedModel

from dianjing.errors import ConfigError, ModelError

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest number of FP8."""
MULTIPLE = 16
"""The FP8 units take matrices whose sides are multiples of this."""


class Fp8Linear(nn.Module):
    """A frozen linear layer whose weight is FP8 with a scale for each output row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, scale = quantized(linear.weight.detach())
        # Not called "weight": peft would give its adapters the type of that.
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Return the product in the precision of `x`."""
        product = fp8_product(x.reshape(-1, x.shape[-1]), self.rows, self.scale).view(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias

    def dequantized(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weight that the layer stands for, in fp32."""
        return self.rows.float() * self.scale


@torch.no_grad()
def quantize_layers_to_fp8(llm: PreTrainedModel, device: torch.device) -> None:
    """Put the linear layers of each decoder layer on `device` in FP8; embeddings, norms and head stay as they are.

    One layer at a time is there in full.

    Raises:
        ModelError: a layer has a size that the FP8 units do not take.
    """
    layers: Any = llm.get_decoder().layers
    for module in [*layers.modules()]:
        for name, linear in [*module.named_children()]:
            if type(linear) is nn.Linear:
                if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                    raise ModelError(
                        f"{type(llm).__name__}: {name} is {linear.in_features} by {linear.out_features}, no multiples "
                        f'of {MULTIPLE}, and cannot be held in FP8; set language_model.quantization to ""'
                    )
                setattr(module, name, Fp8Linear(linear.to(device)))


def quantized(rows: Float[Tensor, "rows columns"]) -> tuple[Tensor, Float[Tensor, "rows 1"]]:
    """Return a matrix in FP8 and the scale of each row: rows ~ quantized * scale."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale


class _Fp8Product(torch.autograd.Function):
    """x @ (rows * scale).T, with x rounded to FP8; the gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, scale)
        return _product(x, rows.T, scale.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, scale = ctx.saved_tensors
        ones = torch.ones_like(rows[:1], dtype=torch.float32)
        return _product(gradient * scale.T, by_columns(rows), ones), None, None


def by_columns(matrix: Float8e4m3fn[Tensor, "rows columns"]) -> Float8e4m3fn[Tensor, "rows columns"]:
    """Return a matrix as the units want the second one of a product: a copy, of one layer."""
    return matrix.view(torch.uint8).T.contiguous().view(FP8).T


def fp8_product(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Return x @ (rows * scale).T, with x rounded to FP8; the gradient of x alone."""
    return cast(Tensor, _Fp8Product.apply(x, rows, scale))


def _product(x: Tensor, columns: Tensor, scale: Float[Tensor, "one columns"]) -> Tensor:
    """Return x @ (columns * scale) in bf16 or fp16, whichever x is in."""
    rows, row_scale = quantized(x)
    return scaled_product(rows, row_scale, columns, scale, x.dtype)


def scaled_product(
    rows: Float8e4m3fn[Tensor, "rows inner"],
    row_scale: Float[Tensor, "rows 1"],
    columns: Float8e4m3fn[Tensor, "inner columns"],
    scale: Float[Tensor, "one columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Return (rows * row_scale) @ (columns * scale)."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (torch 2.11 has no public one by rows)
        rows, columns, scale_a=row_scale, scale_b=scale.contiguous(), out_dtype=dtype, use_fast_accum=True
    )


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device without FP8 units, and arithmetic that is not theirs.

    Raises:
        ConfigError: the alternative is named.
    """
    if dtype == torch.float32 and device.type == "cuda":
        raise ConfigError('language_model.quantization is "fp8", which computes in bf16; set train.precision to "bf16"')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise ConfigError(
        f'language_model.quantization is "fp8", but {name} has no FP8 units (Ada, Hopper and newer GPUs have); set it '
        'to "" for bf16, or to "nf4" for the least memory'
    )
