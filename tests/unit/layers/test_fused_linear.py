"""A fused linear layer alone: against its layers one by one, in each layout, and after its adapters have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from dianjing.layers.fused import adapters
from dianjing.layers.fused.linear import FusedLinear, can_fuse
from dianjing.layers.lora import ADAPTER, LoraLinear

WIDTHS = (12, 8, 8)
INPUTS, RANK = 16, 4


def lora_layers(widths: tuple[int, ...] = WIDTHS, *, bias: bool = True) -> list[Any]:
    torch.manual_seed(0)
    layers = []
    for width in widths:
        base = nn.Linear(INPUTS, width, bias=bias).requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["any"])
        layer: Any = LoraLinear(base, ADAPTER, config=config, r=RANK, lora_alpha=2 * RANK)
        nn.init.normal_(layer.lora_B[ADAPTER].weight)
        layers.append(layer)
    return layers


def one_by_one(layers: list[Any], X: Tensor) -> Tensor:
    return torch.cat([layer(X) for layer in layers], dim=1)


@pytest.mark.parametrize("small", [0, 256])
@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 40])
def test_it_is_its_layers_both_ways(
    monkeypatch: pytest.MonkeyPatch, rows: int, count: int, augment: bool, small: int
) -> None:
    monkeypatch.setattr(adapters, "SMALL", small)
    layers, X = lora_layers(WIDTHS[:count]), torch.randn(rows, INPUTS)
    leaf = X.clone().requires_grad_()
    expected = one_by_one(layers, leaf)
    dY = torch.randn_like(expected)
    parameters = [weight for layer in layers for weight in adapters.weights_of(layer)]
    gradients = torch.autograd.grad(expected, [leaf, *parameters], dY)
    assert can_fuse(layers)
    fused = FusedLinear(layers, augment=augment)
    augmented = fused.augmented(X)
    assert (augmented is not None) == augment
    Y, XA = fused.forward(X if augmented is None else augmented.X.copy_(X), None, None, augmented)
    torch.testing.assert_close(Y, expected)
    dXA = fused.dXA(dY)
    found = [fused.dX(dY, None, dXA, None), *fused.parameter_gradients(dY, X, XA, dXA, None)]
    torch.testing.assert_close(found, [*gradients], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("for_cuda_graph", [True, False])
@pytest.mark.parametrize("change", ["in place", "optimizer", "loaded"])
def test_a_changed_adapter_is_noticed(change: str, for_cuda_graph: bool) -> None:
    """Both copies are then made again: A and B in another precision, and their sum with W."""
    layers, X = lora_layers(), torch.randn(200, INPUTS)
    fused = FusedLinear(layers, augment=True, for_cuda_graph=for_cuda_graph)
    dY = torch.randn(200, sum(WIDTHS))
    fused.forward(X, None, None)
    fused.dX(dY, None, fused.dXA(dY), None)
    B = layers[1].lora_B[ADAPTER].weight
    with torch.no_grad():
        if change == "in place":
            B.add_(1)
        elif change == "optimizer":
            B.grad = torch.full_like(B, -1.0)
            torch.optim.SGD([B], lr=1.0).step()
        else:
            layers[1].load_state_dict({**layers[1].state_dict(), f"lora_B.{ADAPTER}.weight": B + 1})
    leaf = X.clone().requires_grad_()
    expected = one_by_one(layers, leaf)
    torch.testing.assert_close(fused.forward(X, None, None)[0], expected)
    (dX,) = torch.autograd.grad(expected, leaf, dY)
    torch.testing.assert_close(fused.dX(dY, None, fused.dXA(dY), None), dX, rtol=1e-4, atol=1e-4)
