"""Matrix products of an adapter, in fewer passes over memory than torch's own operators take.

They are operators of their own because the compiler would take them apart again: it copies what a product is added
to, and sums a gradient over all tokens of a pack in one go, for which a small matrix has too few tiles to fill a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

TILE = (128, 256)
"""Rows and columns of a product that one processor of the GPU computes at a time."""
FEWEST_ROWS = 256
"""Rows below which a sum is not cut into more parts."""


OPERATORS = torch.library.Library("dianjing", "FRAGMENT")
"""Defined by their schema: with torch's decorator for operators the CPU takes longer at each call."""
OPERATORS.define("sum_of_products(Tensor a, Tensor b, Tensor c, Tensor d, float scale, Tensor? bias) -> Tensor")
OPERATORS.define(
    "sum_of_fp8_products(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor c, Tensor d, float scale) -> Tensor"
)
OPERATORS.define("product_over_rows(Tensor a, Tensor b, float scale) -> Tensor")


def _sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    first = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return first.addmm_(c, d, alpha=scale)


def _sum_of_fp8_products(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, d: Tensor, scale: float
) -> Tensor:
    first = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage] (torch 2.11 has no public one by rows)
        a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=c.dtype, use_fast_accum=True
    )
    return first.addmm_(c, d, alpha=scale)


def _product_over_rows(a: Tensor, b: Tensor, scale: float, into: Tensor | None = None) -> Tensor:
    if not a.is_cuda:
        product = (a.T @ b).float() * scale
        return product if into is None else into.add_(product)
    parts = _parts(a, b)
    if parts == 1 and into is not None:
        return torch.addmm(into, a.T, b, alpha=scale, out_dtype=torch.float32, out=into)
    if parts == 1:
        nothing = a.new_empty(1, 1, dtype=torch.float32)
        return torch.addmm(nothing, a.T, b, beta=0, alpha=scale, out_dtype=torch.float32)
    size = len(a) // parts
    whole = size * parts
    several = torch.bmm(
        a[:whole].unflatten(0, (parts, size)).transpose(1, 2),
        b[:whole].unflatten(0, (parts, size)),
        out_dtype=torch.float32,
    )
    from dianjing.layers.kernels.gemm import sum_of_parts

    return sum_of_parts(several, a[whole:], b[whole:], scale, into)


def _parts(a: Tensor, b: Tensor) -> int:
    """Return in how many parts the rows are summed: as many as fill the GPU, a little less if that leaves no rows."""
    tiles = -(-a.shape[1] // TILE[0]) * -(-b.shape[1] // TILE[1])
    most = max(1, min(_processors(a.device) // tiles, len(a) // FEWEST_ROWS))
    return next((parts for parts in range(most, most // 2, -1) if len(a) % parts == 0), most)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


for _name, _run in (
    ("sum_of_products", _sum_of_products),
    ("sum_of_fp8_products", _sum_of_fp8_products),
    ("product_over_rows", _product_over_rows),
):
    OPERATORS.impl(_name, _run, "CompositeExplicitAutograd")


@torch.library.register_fake("dianjing::sum_of_products")
def _(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("dianjing::sum_of_fp8_products")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, d: Tensor, scale: float) -> Tensor:
    return c.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("dianjing::product_over_rows")
def _(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)


def sum_of_products(
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    c: Float[Tensor, "rows rank"],
    d: Float[Tensor, "rank columns"],
    scale: float,
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return a @ b + bias + scale * c @ d, the second product added where the first one lies."""
    return torch.ops.dianjing.sum_of_products.default(a, b, c, d, scale, bias)


def sum_of_fp8_products(
    a: Float8e4m3fn[Tensor, "rows inner"],
    a_scale: Float[Tensor, "rows 1"],
    b: Float8e4m3fn[Tensor, "inner columns"],
    b_scale: Float[Tensor, "1 columns"],
    c: Float[Tensor, "rows rank"],
    d: Float[Tensor, "rank columns"],
    scale: float,
) -> Float[Tensor, "rows columns"]:
    """Return (a * a_scale) @ (b * b_scale) + scale * c @ d, where a and b are FP8 with scales of rows and columns."""
    return torch.ops.dianjing.sum_of_fp8_products.default(a, a_scale, b, b_scale, c, d, scale)


def product_over_rows(
    a: Float[Tensor, "rows left"], b: Float[Tensor, "rows right"], scale: float
) -> Float[Tensor, "left right"]:
    """Return scale * a.T @ b in fp32: on a GPU in as many parts of the rows as fill it, then their sum."""
    return torch.ops.dianjing.product_over_rows.default(a, b, scale)


def add_product_over_rows(
    a: Float[Tensor, "rows left"], b: Float[Tensor, "rows right"], scale: float, into: Float[Tensor, "left right"]
) -> None:
    """Add what `product_over_rows` returns to a tensor in fp32."""
    _product_over_rows(a, b, scale, into)


def sum_with_product(
    base: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    total: Float[Tensor, "rows columns"],
) -> None:
    """Fill `total` with base + a @ b: on a GPU, without the copy of `base` that torch's operator makes first."""
    if base.is_cuda and base.dtype == torch.bfloat16:
        from dianjing.layers.kernels import gemm as kernels_of_products

        kernels_of_products.sum_with_product(base, a, b, total)
    else:
        torch.addmm(base, a, b, out=total)
