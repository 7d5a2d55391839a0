"""A gated MLP of frozen FP8 layers as one function: what is quantised is written once, and read once."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel

from dianjing.model.fp8 import FP8, Fp8Linear, by_columns, quantized, scaled_product
from dianjing.model.products import OPERATORS

LAYERS = ("gate_proj", "up_proj", "down_proj")
"""The names these have in Llama's MLP, and in those of its many relatives."""


class Fp8Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), its layers frozen in FP8, or carrying adapters."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name in (*LAYERS, "act_fn"):
            setattr(self, name, getattr(mlp, name))

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """Return the MLP's output in the precision of `x`."""
        layers: Any = [getattr(self, name) for name in LAYERS]
        gate, up, down = layers
        if all(type(layer) is Fp8Linear for layer in layers):
            held = [part for layer in layers for part in (layer.rows, layer.scale)]
            return fp8_mlp(x.reshape(-1, x.shape[-1]), *held).view(x.shape)
        return down(cast(Any, self.act_fn)(gate(x)) * up(x))


def join_fp8_mlps(llm: PreTrainedModel) -> None:
    """Put an `Fp8Mlp` in the place of each MLP that it computes; names of weights stay."""
    layers: Any = llm.get_decoder().layers
    for layer in layers:
        if _is_gated(layer.mlp):
            layer.mlp = Fp8Mlp(layer.mlp)


def _is_gated(mlp: nn.Module) -> bool:
    """Return whether a module is three FP8 layers without bias, with SiLU between them."""
    layers = [getattr(mlp, name, None) for name in LAYERS]
    plain = all(type(layer) is Fp8Linear and layer.bias is None for layer in layers)
    named = {name for name, _ in mlp.named_children()} == {*LAYERS, "act_fn"}
    return plain and named and _is_silu(cast(Any, mlp).act_fn)


def _is_silu(function: Any) -> bool:
    points = torch.linspace(-3, 3, 5)
    return torch.equal(function(points), silu(points))


def fp8_mlp(x: Tensor, *held: Tensor) -> Tensor:
    """Return down(silu(gate(x)) * up(x)); `held`: FP8 rows and scales of gate, up and down. The gradient of x alone."""
    return cast(Tensor, _Fp8Mlp.apply(x, *held))


class _Fp8Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *held: Tensor) -> Tensor:  # type: ignore[override]
        gate_rows, gate_scale, up_rows, up_scale, down_rows, down_scale = held
        rows, scale = quantized(x)
        gate = scaled_product(rows, scale, gate_rows.T, gate_scale.T, x.dtype)
        up = scaled_product(rows, scale, up_rows.T, up_scale.T, x.dtype)
        ctx.save_for_backward(gate, up, *held)
        rows, scale = torch.ops.dianjing.silu_product.default(gate, up)
        return scaled_product(rows, scale, down_rows.T, down_scale.T, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up, gate_rows, gate_scale, up_rows, up_scale, down_rows, down_scale = ctx.saved_tensors
        rows, scale = quantized(gradient * down_scale.T)
        to_between = scaled_product(rows, scale, by_columns(down_rows), _ones(down_rows), up.dtype)
        # One product for both: their gradients side by side, their weights one below the other.
        rows, scale = torch.ops.dianjing.silu_product_backward.default(
            to_between, gate, up, gate_scale.flatten(), up_scale.flatten()
        )
        to_x = scaled_product(rows, scale, by_columns(gate_rows, up_rows), _ones(gate_rows), up.dtype)
        return to_x, *[None] * 6


def _ones(rows: Tensor) -> Tensor:
    """Return scales for a product whose scales are in the gradient already."""
    return torch.ones_like(rows[:1], dtype=torch.float32)


OPERATORS.define("silu_product(Tensor gate, Tensor up) -> (Tensor, Tensor)")
OPERATORS.define(
    "silu_product_backward(Tensor gradient, Tensor gate, Tensor up, Tensor gate_scale, Tensor up_scale)"
    " -> (Tensor, Tensor)"
)


def _silu_product(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if gate.is_cuda:
        from dianjing.model.fp8_kernels import silu_product

        return silu_product(gate, up, FP8)
    return quantized(silu(gate.float()) * up.float())


def _silu_product_backward(
    gradient: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor, up_scale: Tensor
) -> tuple[Tensor, Tensor]:
    if gate.is_cuda:
        from dianjing.model.fp8_kernels import silu_product_backward

        return silu_product_backward(gradient, gate, up, gate_scale, up_scale, FP8)
    with torch.enable_grad():
        ends = gate.float().requires_grad_(), up.float().requires_grad_()
        to_gate, to_up = torch.autograd.grad(silu(ends[0]) * ends[1], ends, gradient.float())
    return quantized(torch.cat([to_gate * gate_scale, to_up * up_scale], dim=1))


OPERATORS.impl("silu_product", _silu_product, "CompositeExplicitAutograd")
OPERATORS.impl("silu_product_backward", _silu_product_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("dianjing::silu_product")
def _(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate, dtype=FP8), gate.new_empty(gate.shape[0], 1, dtype=torch.float32)


@torch.library.register_fake("dianjing::silu_product_backward")
def _(gradient: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor, up_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = gate.new_empty(gate.shape[0], 2 * gate.shape[1], dtype=FP8)
    return rows, gate.new_empty(gate.shape[0], 1, dtype=torch.float32)
