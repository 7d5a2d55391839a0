"""GEMMs of adapters, with fewer passes over memory than torch's own operators.

They are operators of their own because torch's compiler would take them apart again: it copies the matrix that a
product is added to, and sums a weight's gradient over all tokens of a pack in one pass, for which a small matrix has
too few tiles to fill a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from dianjing.layers.backend import has_kernel
from dianjing.layers.fp8 import scaled_gemm

TILE = (128, 256)
"""Rows and columns of a product that one processor of the GPU computes at a time."""
FEWEST_ROWS = 256
"""A sum over rows is not split into pieces shorter than this."""


OPERATORS = torch.library.Library("dianjing", "FRAGMENT")
"""Defined by their schema: operators made with torch's decorator take the CPU longer at each call."""
OPERATORS.define("two_gemms(Tensor a, Tensor b, Tensor c, Tensor d, float scale, Tensor? bias) -> Tensor")
OPERATORS.define(
    "two_gemms_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor c, Tensor d, float scale) -> Tensor"
)
OPERATORS.define("gemm_tn(Tensor a, Tensor b, float scale) -> Tensor")


def _two_gemms(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    first = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return first.addmm_(c, d, alpha=scale)


def _two_gemms_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, d: Tensor, scale: float
) -> Tensor:
    return scaled_gemm(a, a_scale, b, b_scale, c.dtype).addmm_(c, d, alpha=scale)


def _gemm_tn(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    if not a.is_cuda:
        product = (a.T @ b).float() * scale
        return product if out is None else out.add_(product)
    splits = _num_splits(a, b)
    if splits == 1 and out is not None:
        return torch.addmm(out, a.T, b, alpha=scale, out_dtype=torch.float32, out=out)
    if splits == 1:
        nothing = a.new_empty(1, 1, dtype=torch.float32)
        return torch.addmm(nothing, a.T, b, beta=0, alpha=scale, out_dtype=torch.float32)
    size = len(a) // splits
    whole = size * splits
    products = torch.bmm(
        a[:whole].unflatten(0, (splits, size)).transpose(1, 2),
        b[:whole].unflatten(0, (splits, size)),
        out_dtype=torch.float32,
    )
    return sum_splits(products, a[whole:], b[whole:], scale, out)


@has_kernel("gemm")
def sum_splits(
    products: Float[Tensor, "splits left right"],
    a: Float[Tensor, "rows left"],
    b: Float[Tensor, "rows right"],
    scale: float,
    out: Float[Tensor, "left right"] | None,
) -> Float[Tensor, "left right"]:
    """Return scale * (the sum of the products + a.T @ b), where a and b have few rows; added to `out` if given."""
    total = (products.sum(0) + a.T.float() @ b.float()) * scale
    return total if out is None else out.add_(total)


def _num_splits(a: Tensor, b: Tensor) -> int:
    """Return into how many pieces the rows are split: enough to fill the GPU, a few less if no rows are left over."""
    tiles = -(-a.shape[1] // TILE[0]) * -(-b.shape[1] // TILE[1])
    most = max(1, min(_processors(a.device) // tiles, len(a) // FEWEST_ROWS))
    return next((splits for splits in range(most, most // 2, -1) if len(a) % splits == 0), most)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


for _name, _run in (("two_gemms", _two_gemms), ("two_gemms_fp8", _two_gemms_fp8), ("gemm_tn", _gemm_tn)):
    OPERATORS.impl(_name, _run, "CompositeExplicitAutograd")


@torch.library.register_fake("dianjing::two_gemms")
def _(a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("dianjing::two_gemms_fp8")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, d: Tensor, scale: float) -> Tensor:
    return c.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("dianjing::gemm_tn")
def _(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return a.new_empty(a.shape[1], b.shape[1], dtype=torch.float32)


def two_gemms(
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    c: Float[Tensor, "rows rank"],
    d: Float[Tensor, "rank columns"],
    scale: float,
    bias: Float[Tensor, " columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return a @ b + bias + scale * c @ d, the second product added in place to the first."""
    return torch.ops.dianjing.two_gemms.default(a, b, c, d, scale, bias)


def two_gemms_fp8(
    a: Float8e4m3fn[Tensor, "rows inner"],
    a_scale: Float[Tensor, "rows 1"],
    b: Float8e4m3fn[Tensor, "inner columns"],
    b_scale: Float[Tensor, "1 columns"],
    c: Float[Tensor, "rows rank"],
    d: Float[Tensor, "rank columns"],
    scale: float,
) -> Float[Tensor, "rows columns"]:
    """Return (a * a_scale) @ (b * b_scale) + scale * c @ d, where a and b are FP8 with scales of rows and columns."""
    return torch.ops.dianjing.two_gemms_fp8.default(a, a_scale, b, b_scale, c, d, scale)


def gemm_tn(a: Float[Tensor, "rows left"], b: Float[Tensor, "rows right"], scale: float) -> Float[Tensor, "left right"]:
    """Return scale * a.T @ b in fp32: on a GPU the rows are split into enough pieces to fill it (split-K)."""
    return torch.ops.dianjing.gemm_tn.default(a, b, scale)


def add_gemm_tn(
    a: Float[Tensor, "rows left"], b: Float[Tensor, "rows right"], scale: float, out: Float[Tensor, "left right"]
) -> None:
    """Add scale * a.T @ b to `out`, in fp32."""
    _gemm_tn(a, b, scale, out)


@has_kernel("gemm")
def addmm_out(
    base: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
    out: Float[Tensor, "rows columns"],
) -> None:
    """Fill `out` with base + a @ b: the kernel spares the copy of `base` that torch's operator makes on a GPU."""
    torch.addmm(base, a, b, out=out)
