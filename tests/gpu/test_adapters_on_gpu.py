"""GEMMs of adapters on a GPU: split-K sums, and products added in place."""

from __future__ import annotations

import pytest
import torch

from dianjing.layers.gemm import add_gemm_tn, addmm_out, gemm_tn, two_gemms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: products of adapters are not tested"),
]


@pytest.mark.parametrize("shape", [(12_289, 512, 2048), (1003, 64, 1024), (100, 16, 16)])
def test_a_split_sum_is_the_sum(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, left, right = shape
    a, b = (torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for columns in (left, right))
    found, exact = gemm_tn(a, b, 0.5), 0.5 * a.double().T @ b.double()
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 1e-5 * exact.norm()
    held = torch.randn_like(found)
    total = held.double() + exact
    add_gemm_tn(a, b, 0.5, held)
    assert (held - total).norm() < 1e-5 * total.norm()


def test_what_is_added_in_place_is_the_sum() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    bias = torch.randn(64, device="cuda", dtype=torch.bfloat16)
    exact = a.double() @ b.double() + bias.double() + 0.5 * c.double() @ d.double()
    assert (two_gemms(a, b, c, d, 0.5, bias) - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(3072, 192, 1024), (16_384, 512, 2048), (130, 70, 200), (33, 5, 17)]
)
def test_a_product_is_added_to_part_of_something_wider(rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(0)
    wide = torch.randn(rows, columns + 10, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(rows, inner + 4, device="cuda", dtype=torch.bfloat16)[:, 4:]
    b, total = (torch.randn(count, columns, device="cuda", dtype=torch.bfloat16) for count in (inner, rows))
    addmm_out(wide[:, 3:-7], a, b, total)
    exact = wide[:, 3:-7].double() + a.double() @ b.double()
    assert (total - exact).norm() < 2e-3 * exact.norm()
