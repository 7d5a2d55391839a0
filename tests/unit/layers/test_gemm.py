"""GEMMs of an adapter against the sums they stand for, on a CPU; tests/gpu has the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dianjing.layers.fp8 import FP8, column_major, quantize
from dianjing.layers.gemm import add_gemm_tn, addmm_out, gemm_tn, two_gemms


def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in shapes]


def test_a_two_gemms() -> None:
    a, b, c, d = matrices((5, 4), (4, 6), (5, 2), (2, 6))
    bias = torch.randn(6)
    torch.testing.assert_close(two_gemms(a, b, c, d, 0.5), a @ b + 0.5 * c @ d)
    torch.testing.assert_close(two_gemms(a, b, c, d, 0.5, bias), a @ b + bias + 0.5 * c @ d)
    assert torch.equal(two_gemms(a, b, c[:, :0], d[:0], 0.5), a @ b)


def test_a_product_is_added_to_a_matrix() -> None:
    base, a, b, total = matrices((5, 6), (5, 4), (4, 6), (5, 6))
    addmm_out(base, a, b, total)
    torch.testing.assert_close(total, base + a @ b)


def test_a_gradient_is_summed_in_fp32() -> None:
    a, b = matrices((40, 3), (40, 7))
    found = gemm_tn(a.bfloat16(), b.bfloat16(), 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, 0.5 * a.T @ b, rtol=0.02, atol=0.1)
    held = torch.ones(3, 7)
    add_gemm_tn(a.bfloat16(), b.bfloat16(), 0.5, held)
    torch.testing.assert_close(held, found + 1)


def test_a_matrix_is_held_by_columns() -> None:
    (matrix,) = matrices((4, 3))
    rows = quantize(matrix).rows
    transposed = column_major(rows)
    assert transposed.dtype == FP8
    assert transposed.stride() == (1, 4)
    assert torch.equal(transposed.float(), rows.float())
