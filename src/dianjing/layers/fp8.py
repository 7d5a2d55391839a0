"""Frozen linear layers in FP8 (e4m3), multiplied by the GPU's FP8 units in the forward and the backward pass.

W is held once, in FP8 with a scale for each output row: W = W8 * c[:, None]. Both GEMMs read that one copy:

    Y  = X W'  = (X8 r)(W8' c')      X rounded to FP8 by rows, X = X8 * r[:, None]
    dX = dY W  = (dY c) W8           the scales go into dY, which is then rounded to FP8 by rows

The scales of a GEMM's inputs must not vary along the dimension that is summed over; that is why c moves into dY. All
sums are made in the units' accumulators, results are in bf16, and rounded inputs are made for each GEMM and not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor, nn
from transformers import PreTrainedModel

from dianjing.errors import ConfigError, ModelError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest number of FP8 (e4m3)."""
MULTIPLE = 16
"""The FP8 units take matrices whose sides are multiples of this."""


class Fp8Rows(NamedTuple):
    """A matrix in FP8 with a scale for each row: rows * scale."""

    rows: Float8e4m3fn[Tensor, "rows columns"]
    scale: Float[Tensor, "rows 1"]


class Fp8Linear(nn.Module):
    """A frozen linear layer whose weight is FP8 with a scale for each output row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rows, scale = quantize(linear.weight.detach())
        # Not called "weight": peft would give its adapters the type of that.
        self.rows = nn.Parameter(rows, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows outputs"]:
        """Return the layer's output in the precision of `x`."""
        y = fp8_gemm(x.reshape(-1, x.shape[-1]), self.rows, self.scale).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> Float[Tensor, "outputs inputs"]:
        """Return the weight in fp32, as the layer computes with it."""
        return self.rows.float() * self.scale


@torch.no_grad()
def quantize_layers_to_fp8(llm: PreTrainedModel, device: torch.device) -> None:
    """Move the linear layers of each decoder layer to `device` in FP8; embeddings, norms and head stay as they are.

    At any time only one layer is held in full precision too.

    Raises:
        ModelError: the FP8 units cannot multiply a layer of this size.
    """
    layers: Any = llm.get_decoder().layers
    for module in [*layers.modules()]:
        for name, linear in [*module.named_children()]:
            if type(linear) is nn.Linear:
                if linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
                    raise ModelError(
                        f"{type(llm).__name__}: {name} is {linear.in_features} by {linear.out_features}, which are not "
                        f"both multiples of {MULTIPLE}, so it cannot be held in FP8; set "
                        'language_model.quantization to ""'
                    )
                setattr(module, name, Fp8Linear(linear.to(device)))


def quantize(matrix: Float[Tensor, "rows columns"]) -> Fp8Rows:
    """Return a matrix rounded to FP8, the largest number of each row being FP8_MAX."""
    scale = matrix.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return Fp8Rows((matrix.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


class _Fp8Gemm(torch.autograd.Function):
    """Y = X (W8 c)', with X rounded to FP8; dX = (dY c') W8, with dY c' rounded to FP8. W8 and c are frozen."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, rows: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, scale)
        return scaled_gemm(*quantize(X), rows.T, scale.T, X.dtype)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, scale = ctx.saved_tensors
        ones = torch.ones_like(rows[:1], dtype=torch.float32)
        scaled = dY * scale.T
        return scaled_gemm(*quantize(scaled), column_major(rows), ones, scaled.dtype), None, None


def column_major(matrix: Float8e4m3fn[Tensor, "rows columns"]) -> Float8e4m3fn[Tensor, "rows columns"]:
    """Return a copy of a matrix laid out by columns, as the units want the second operand of a GEMM."""
    return matrix.view(torch.uint8).T.contiguous().view(FP8).T


def fp8_gemm(
    X: Float[Tensor, "rows inputs"], rows: Float8e4m3fn[Tensor, "outputs inputs"], scale: Float[Tensor, "outputs 1"]
) -> Float[Tensor, "rows outputs"]:
    """Return X @ (rows * scale).T, with X rounded to FP8; only X gets a gradient."""
    return cast(Tensor, _Fp8Gemm.apply(X, rows, scale))


def scaled_gemm(
    a: Float8e4m3fn[Tensor, "rows inner"],
    a_scale: Float[Tensor, "rows 1"],
    b: Float8e4m3fn[Tensor, "inner columns"],
    b_scale: Float[Tensor, "one columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Return (a * a_scale) @ (b * b_scale) in `dtype`, bf16 or fp16."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (torch 2.11 has no public one by rows)
        a, b, scale_a=a_scale, scale_b=b_scale.contiguous(), out_dtype=dtype, use_fast_accum=True
    )


def require_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device without FP8 units, and a precision that they do not compute in.

    Raises:
        ConfigError: the device or the precision does not fit; the message names the alternative.
    """
    if dtype == torch.float32 and device.type == "cuda":
        raise ConfigError('language_model.quantization is "fp8", which computes in bf16; set train.precision to "bf16"')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise ConfigError(
        f'language_model.quantization is "fp8", but {name} has no FP8 units (Ada, Hopper and newer GPUs do); set it '
        'to "" for bf16, or to "nf4" for the least memory'
    )
