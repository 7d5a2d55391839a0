"""Adapters on a GPU: sums in parts, and the tower's work recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dianjing.model.compile import compile_layers
from dianjing.model.forward import RECORDED
from dianjing.model.products import product_over_rows, sum_of_products
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: recorded work is not tested"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler calls parts of torch old
]


@pytest.mark.parametrize("shape", [(12_289, 512, 2048), (1003, 64, 1024), (100, 16, 16)])
def test_a_sum_in_parts_is_the_sum(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, left, right = shape
    a, b = (torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for columns in (left, right))
    found, exact = product_over_rows(a, b), a.double().T @ b.double()
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_what_is_added_in_place_is_the_sum() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    bias = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    exact = a.double() @ b.double() + bias.double() + 0.5 * c.double() @ d.double()
    assert (sum_of_products(a, b, c, d, 0.5, bias) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("columns", [96, 8192])
def test_one_pass_over_an_mlps_rows_is_the_two(columns: int) -> None:
    torch.manual_seed(0)
    gate, up, gradient = (torch.randn(70, columns, dtype=torch.bfloat16) for _ in range(3))
    scales = torch.rand(columns) + 0.5, torch.rand(columns) + 0.5
    for operator, inputs in (
        (torch.ops.dianjing.silu_product.default, (gate, up)),
        (torch.ops.dianjing.silu_product_backward.default, (gradient, gate, up, *scales)),
    ):
        expected = operator(*inputs)
        found = [part.cpu() for part in operator(*(part.cuda() for part in inputs))]
        torch.testing.assert_close(found[1], expected[1])
        # A number half-way between two of FP8's may go either way.
        assert (found[0].float() != expected[0].float()).float().mean() < 1e-3


def test_a_recorded_tower_is_the_tower(make_recipe: MakeRecipe) -> None:
    tuning: Any = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
    model, dataset = prepare(make_recipe("finetune", train={"precision": "bf16"}, **tuning))
    model.cuda()
    # Of one, two and three pictures, and the first again: recordings share their memory.
    batches = [dataset.batch(records).to("cuda") for records in ([0], [0, 1], [0, 1, 2], [0])]
    compile_layers(model)
    recorded = getattr(model.model.vision_tower, RECORDED)
    outcome(model, batches[:1])
    assert recorded._recordings

    def one_after_another() -> tuple[list[float], dict[str, torch.Tensor]]:
        model.zero_grad()
        losses = []
        for batch in batches:
            loss = outcome_of_one(model, batch)
            losses.append(loss)
        return losses, {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    replayed = one_after_another()
    setattr(model.model.vision_tower, RECORDED, None)
    plain = one_after_another()
    assert replayed[0] == pytest.approx(plain[0], rel=2e-3)
    assert replayed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert float((replayed[1][name] - gradient).norm()) <= 0.02 * float(gradient.norm()), name


def outcome_of_one(model: Any, batch: Any) -> float:
    from dianjing.model.forward import forward_loss

    loss = forward_loss(model, batch)
    loss.backward()
    return loss.item()
