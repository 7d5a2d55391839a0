"""Our LoRA layer against peft's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from dianjing.layers.lora import LoraLinear


def make(kind: Callable[..., Any], *, bias: bool = True, dropout: float = 0.0, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout)
    layer = kind(nn.Linear(6, 10, bias=bias, dtype=dtype), "default", config=config, r=3, lora_alpha=7)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        for adapter in (layer.lora_A, layer.lora_B):
            adapter["default"].weight.data = adapter["default"].weight.data.float()
    layer.base_layer.requires_grad_(False)
    return layer.train()


def run(layer: Any, x: Tensor) -> list[Tensor]:
    """Return the output, the gradient of the input and those of the adapter."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    output = layer(x)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output, x.grad, *(adapter["default"].weight.grad for adapter in (layer.lora_A, layer.lora_B))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_it_is_pefts_in_fp32(bias: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(run(make(LoraLinear, bias=bias), x), run(make(PeftLinear, bias=bias), x))


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"dtype": torch.bfloat16}])
def test_it_is_pefts_with_dropout_and_in_bf16(settings: dict[str, Any]) -> None:
    x = torch.randn(4, 6, dtype=settings.get("dtype", torch.float32))
    near = {torch.float32: 1e-6, torch.bfloat16: 0.03}[x.dtype]
    for ours, theirs in zip(run(make(LoraLinear, **settings), x), run(make(PeftLinear, **settings), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.detach().abs().max()))


@torch.no_grad()
def test_one_row_is_answered_without_the_sum_of_the_weights() -> None:
    layer, x = make(LoraLinear), torch.randn(64, 6)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1])


def test_autocast_does_not_round_the_adapter_away() -> None:
    layer, x = make(LoraLinear), torch.ones(1, 6)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-5)
        layer.base_layer.weight.fill_(1.0)
        layer.base_layer.bias.zero_()
        before = layer.base_layer(x)
        assert (layer(x) - before).abs().max() > 0
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x), rtol=0.01, atol=0)


def test_without_dropout_at_work_it_is_the_sum() -> None:
    layer, x = make(LoraLinear, dropout=0.5).eval(), torch.randn(4, 6)
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, merged, layer.base_layer.bias))
