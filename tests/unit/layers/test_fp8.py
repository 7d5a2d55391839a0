"""FP8 layers against the exact product of the weights they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from dianjing.errors import ConfigError, ModelError
from dianjing.export.merge import merged_state
from dianjing.layers.fp8 import FP8, Fp8Linear, quantize, quantize_layers_to_fp8, require_fp8
from dianjing.model.build import build
from dianjing.model.language import load_language_model
from dianjing.model.stage import apply_stage
from tests.conftest import MakeRecipe
from tests.packs import prepare
from tests.tiny import write_llm

STEP = 2**-4
"""Largest rounding error of FP8, on the scale of the number itself (three bits behind the point, rounded)."""


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_no_number_moves_by_more_than_a_step() -> None:
    rows = matrix(8, 64) * torch.logspace(-6, 6, 8)[:, None]
    eight_bits, scale = quantize(rows)
    assert eight_bits.dtype == FP8
    smallest = scale * 2**-9  # below 2**-6 the steps are even
    assert ((eight_bits.float() * scale - rows).abs() <= torch.maximum(rows.abs() * STEP, smallest)).all()


def test_a_row_of_zeros_stays_zeros() -> None:
    eight_bits, scale = quantize(torch.zeros(2, 16))
    assert (eight_bits.float() * scale == 0).all()


@pytest.mark.parametrize("bias", [True, False])
def test_both_passes_multiply_with_the_same_weight(bias: bool) -> None:
    plain = nn.Linear(64, 32, bias=bias).bfloat16()
    layer = Fp8Linear(plain)
    x = matrix(5 * 3, 64, 1).view(5, 3, 64).bfloat16().requires_grad_()
    weights = matrix(5 * 3, 32, 2).view(5, 3, 32).bfloat16()
    output = layer(x)
    output.backward(weights)
    # All the error there is comes from rounding what is multiplied with the weight.
    exact = linear(x.detach().float(), layer.dequantized(), None if plain.bias is None else plain.bias.float())
    assert (output.float() - exact).norm() < 0.04 * exact.norm()
    to_x = weights.float() @ layer.dequantized()
    assert x.grad is not None
    assert (x.grad.float() - to_x).norm() < 0.04 * to_x.norm()
    assert (layer.dequantized() - plain.weight.float()).norm() < 0.04 * plain.weight.float().norm()


def test_lora_stands_on_it_and_is_merged(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    folder = write_llm(tmp_path, intermediate_size=64)
    recipe = make_recipe("finetune", language_model={"folder": str(folder), "tuning": "lora"})
    plain = merged_state(prepare(make_recipe("pretrain", language_model={"folder": str(folder)}))[0])
    held: Any = build(recipe).model
    quantize_layers_to_fp8(held.model, torch.device("cpu"))
    apply_stage(held, recipe)
    adapters = [weight for name, weight in held.named_parameters() if "lora_" in name]
    assert adapters
    assert all(weight.dtype == torch.float32 for weight in adapters)
    merged = merged_state(held)
    assert merged.keys() == plain.keys()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert 0 < (merged[name] - plain[name]).norm() < 0.04 * plain[name].norm()
    layer = held.model.language_model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1.0)
    assert torch.equal(merged_state(held)[name], merged[name] + layer.get_delta_weight("default"))


def test_a_layer_of_an_odd_size_is_named(tiny_llm: Any) -> None:
    model = load_language_model(tiny_llm, torch.bfloat16)[0]
    model.model.layers[1].mlp.gate_proj = nn.Linear(32, 50)
    with pytest.raises(ModelError, match="gate_proj is 32 by 50, which are not both multiples of 16"):
        quantize_layers_to_fp8(model, torch.device("cpu"))


def test_a_machine_without_the_units_is_told_the_alternative() -> None:
    with pytest.raises(ConfigError, match=r'a CPU has no FP8 units .* or to "nf4"'):
        require_fp8(torch.device("cpu"), torch.float32)
