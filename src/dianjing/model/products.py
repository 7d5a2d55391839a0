"""Matrix products of an adapter, in fewer passes over memory than torch's own operators take.

They are operators of their own because the compiler would take them apart again: it copies what a product is added
to, and sums a gradient over all tokens of a pack in one go, for which a small matrix has too few tiles to fill a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

TILE = (128, 256)
"""Rows and columns of a product that one processor of the GPU computes at a time."""
FEWEST_ROWS = 256
"""Rows below which a sum is not cut into more parts."""


@torch.library.custom_op("dianjing::sum_of_products", mutates_args=())
def sum_of_products(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a @ b + bias + scale * c @ d, the second product added where the first one lies."""
    first = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return first.addmm_(c, d, alpha=scale)


@sum_of_products.register_fake
def _(
    a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float, bias: Tensor | None = None
) -> Float[Tensor, "rows columns"]:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("dianjing::sum_of_fp8_products", mutates_args=())
def sum_of_fp8_products(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Return (a * a_scale) @ (b * b_scale) + scale * c @ d, a and b being FP8 with scales for rows and columns."""
    first = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (torch 2.11 has no public one by rows)
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=c.dtype, use_fast_accum=True
    )
    return first.addmm_(c, d, alpha=scale)


@sum_of_fp8_products.register_fake
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, d: Tensor, scale: float
) -> Float[Tensor, "rows columns"]:
    return c.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("dianjing::product_over_rows", mutates_args=())
def product_over_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a.T @ b in fp32: on a GPU in as many parts of the rows as fill it, then their sum."""
    if not a.is_cuda:
        return (a.T @ b).float()
    parts = _parts(a, b)
    whole = len(a) // parts * parts
    halves = (rows[:whole].reshape(parts, whole // parts, rows.shape[1]) for rows in (a, b))
    a_parts, b_parts = halves
    total = torch.bmm(a_parts.transpose(1, 2), b_parts, out_dtype=torch.float32).sum(0)
    if whole < len(a):
        total += torch.mm(a[whole:].T, b[whole:], out_dtype=torch.float32)
    return total


@product_over_rows.register_fake
def _(a: Tensor, b: Tensor) -> Float[Tensor, "columns_of_a columns_of_b"]:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)


def _parts(a: Tensor, b: Tensor) -> int:
    tiles = -(-a.shape[1] // TILE[0]) * -(-b.shape[1] // TILE[1])
    return max(1, min(_processors(a.device) // tiles, len(a) // FEWEST_ROWS))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
