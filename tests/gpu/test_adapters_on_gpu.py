"""Adapters on a GPU: sums in parts, and products added in place."""

from __future__ import annotations

import pytest
import torch

from dianjing.model.products import product_over_rows, sum_of_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: products of adapters are not tested"),
]


@pytest.mark.parametrize("shape", [(12_289, 512, 2048), (1003, 64, 1024), (100, 16, 16)])
def test_a_sum_in_parts_is_the_sum(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, left, right = shape
    a, b = (torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for columns in (left, right))
    found, exact = product_over_rows(a, b, 0.5), 0.5 * a.double().T @ b.double()
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-5 * exact.norm()


def test_what_is_added_in_place_is_the_sum() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    bias = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    exact = a.double() @ b.double() + bias.double() + 0.5 * c.double() @ d.double()
    assert (sum_of_products(a, b, c, d, 0.5, bias) - exact).norm() < 0.01 * exact.norm()
