"""The operations of a layer between its GEMMs, forward and backward: norms, RoPE, gates, activations, dropout, gathers.

Here each operator is written in torch, which runs on a CPU; on a GPU the kernel of the same name runs instead
(backend.py), in one pass over memory. Sums are made in fp32. `keep` asks for the result as it is, `fp8` for the result
rounded to FP8 with a scale for each row. A backward operator with `column_scale` returns its result, times that number
for each column, in FP8 too: the columns' numbers are the scales of the FP8 weights it is multiplied by next (fp8.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float8e4m3fn, Int
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, silu

from dianjing.layers.backend import has_kernel
from dianjing.layers.fp8 import Fp8Rows, column_major, quantize

ACTIVATIONS = ("quick_gelu", "gelu_pytorch_tanh", "gelu")
"""Names, as in a model's config, of the activations that `activation` computes."""

Seeds = Int[Tensor, " adapters"] | None
"""One for the dropout of each adapter; None without dropout."""


class Augmented(NamedTuple):
    """Rows X as columns of a wider matrix, [X | XA] or [XA0 | X | XA1], with room for the products of adapters."""

    matrix: Float[Tensor, "rows wider"]
    offset: int
    """Columns before those of X."""
    columns: int

    @property
    def X(self) -> Float[Tensor, "rows columns"]:
        """The rows, where they are in memory."""
        return self.matrix[:, self.offset : self.offset + self.columns]


class Heads(NamedTuple):
    """How the columns [q | k | v] are cut into heads."""

    query: int
    key_value: int
    size: int

    @property
    def number(self) -> int:
        """Heads of queries, keys and values."""
        return self.query + 2 * self.key_value


@has_kernel("fp8")
def quantize_rows(x: Float[Tensor, "rows columns"], column_scale: Float[Tensor, " columns"] | None = None) -> Fp8Rows:
    """Return a matrix, times a number for each column, in FP8."""
    return quantize(x.float() if column_scale is None else x.float() * column_scale)


@has_kernel("gather")
def gather_rows(x: Float[Tensor, "rows ..."], rows: Int[Tensor, " places"]) -> Float[Tensor, "places ..."]:
    """Return x[rows], with zeros where `rows` has -1."""
    if not len(x):
        return x.new_zeros(len(rows), *x.shape[1:])
    return x[rows.clamp(min=0)] * (rows >= 0).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


@has_kernel("fp8")
def gather_and_quantize(
    x: Float[Tensor, "rows columns"], taken: Int[Tensor, " taken"] | None, *, keep: bool
) -> tuple[Float[Tensor, "taken columns"] | None, Fp8Rows]:
    """Return x[taken], zeros where `taken` has -1, as it is if `keep`, and in FP8; all rows if `taken` is None."""
    rows = x if taken is None else gather_rows(x, taken)
    return rows if keep else None, quantize_rows(rows)


@has_kernel("fp8")
def transpose_fp8(matrix: Float8e4m3fn[Tensor, "rows columns"]) -> Float8e4m3fn[Tensor, "rows columns"]:
    """Return a copy of a matrix laid out by columns, as the FP8 units want the second operand of a GEMM."""
    return column_major(matrix)


class NormOutput(NamedTuple):
    """The results of `norm`; None for what was not asked for."""

    total: Float[Tensor, "rows columns"] | None
    """x + y."""
    rows: Float[Tensor, "rows columns"] | None
    fp8: Fp8Rows | None


@has_kernel("norms")
def norm(
    x: Float[Tensor, "rows columns"],
    weight: Float[Tensor, " columns"],
    bias: Float[Tensor, " columns"] | None,
    eps: float,
    *,
    y: Float[Tensor, "rows columns"] | None = None,
    keep: bool = True,
    augmented: Augmented | None = None,
    fp8: bool = False,
) -> NormOutput:
    """Return the norm of the rows of x + y: RMSNorm (arXiv 1910.07467), or with a bias LayerNorm (arXiv 1607.06450).

    With `augmented`, the result is written there.
    """
    total = x if y is None else x + y
    rows = _normed(total.float(), weight.float(), None if bias is None else bias.float(), eps)
    kept, in_fp8 = rows.to(x.dtype) if keep else None, quantize_rows(rows) if fp8 else None
    if kept is not None and augmented is not None:
        kept = augmented.X.copy_(kept)
    return NormOutput(None if y is None else total, kept, in_fp8)


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return layer_norm(x, x.shape[-1:], weight, bias, eps)


@has_kernel("norms")
def norm_backward(
    dY: Float[Tensor, "rows columns"],
    x: Float[Tensor, "rows columns"],
    weight: Float[Tensor, " columns"],
    eps: float,
    *,
    center: bool,
    residual: Float[Tensor, "rows columns"] | None = None,
    column_scale: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "rows columns"], Fp8Rows | None]:
    """Return the gradient of x, the sum that was normed (`center`: by LayerNorm), plus that of the residual."""
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        bias = torch.zeros_like(weight, dtype=torch.float32) if center else None
        rows = _normed(leaf, weight.detach().float(), bias, eps)
        (dX,) = torch.autograd.grad(rows, leaf, dY.float())
    dX = (dX if residual is None else dX + residual.float()).to(x.dtype)
    return dX, None if column_scale is None else quantize_rows(dX, column_scale)


@has_kernel("norms")
def qk_norm(
    qkv: Float[Tensor, "tokens columns"],
    q_weight: Float[Tensor, " size"],
    k_weight: Float[Tensor, " size"],
    heads: Heads,
    eps: float,
) -> Float[Tensor, "tokens columns"]:
    """Return [q | k | v] with each head of q and k normed by RMSNorm, v as it is."""
    q, k, v = _split_heads(qkv, heads)
    q, k = (_normed(x.float(), w.float(), None, eps).to(qkv.dtype) for x, w in ((q, q_weight), (k, k_weight)))
    return torch.cat([q, k, v], dim=1).flatten(1)


@has_kernel("norms")
def qk_norm_backward(
    dY: Float[Tensor, "tokens columns"],
    qkv: Float[Tensor, "tokens columns"],
    q_weight: Float[Tensor, " size"],
    k_weight: Float[Tensor, " size"],
    heads: Heads,
    eps: float,
) -> Float[Tensor, "tokens columns"]:
    """Return the gradient of [q | k | v] from that of `qk_norm`'s result; on a GPU it is written over dY."""
    (q, k, _), (dq, dk, dv) = _split_heads(qkv, heads), _split_heads(dY, heads)
    parts = [
        norm_backward(dy.reshape(-1, heads.size), x.reshape(-1, heads.size), w, eps, center=False)[0].view(x.shape)
        for dy, x, w in ((dq, q, q_weight), (dk, k, k_weight))
    ]
    return torch.cat([*parts, dv], dim=1).flatten(1)


def _split_heads(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    counts = [heads.query, heads.key_value, heads.key_value]
    query, key, value = qkv.view(len(qkv), heads.number, heads.size).split(counts, dim=1)
    return query, key, value


@has_kernel("gates")
def swiglu(
    gate_up: Float[Tensor, "rows both"], *, keep: bool = True, fp8: bool = False
) -> tuple[Float[Tensor, "rows columns"] | None, Fp8Rows | None]:
    """Return silu(gate) * up (arXiv 2002.05202) of [gate | up]."""
    gate, up = gate_up.float().chunk(2, dim=1)
    rows = silu(gate) * up
    return rows.to(gate_up.dtype) if keep else None, quantize_rows(rows) if fp8 else None


@has_kernel("gates")
def swiglu_backward(
    dY: Float[Tensor, "rows columns"],
    gate_up: Float[Tensor, "rows both"],
    *,
    keep: bool = True,
    column_scale: Float[Tensor, " both"] | None = None,
    recompute: bool = False,
) -> tuple[Float[Tensor, "rows both"] | None, Fp8Rows | None, Float[Tensor, "rows columns"] | None]:
    """Return the gradient of [gate | up], as it is and in FP8, and with `recompute` the result of `swiglu`.

    On a GPU the gradient is written over gate_up, and the result of `swiglu` over dY.
    """
    with torch.enable_grad():
        leaf = gate_up.detach().float().requires_grad_()
        gate, up = leaf.chunk(2, dim=1)
        rows = silu(gate) * up
        (d_gate_up,) = torch.autograd.grad(rows, leaf, dY.float())
    return (
        d_gate_up.to(gate_up.dtype) if keep else None,
        None if column_scale is None else quantize_rows(d_gate_up, column_scale),
        rows.detach().to(gate_up.dtype) if recompute else None,
    )


@has_kernel("rope")
def rope(
    qkv: Float[Tensor, "tokens columns"],
    cos: Float[Tensor, "tokens size"],
    sin: Float[Tensor, "tokens size"],
    heads: Heads,
    tokens: Int[Tensor, " slots"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k of [q | k | v] rotated by their positions (arXiv 2104.09864), and v: each (slots, heads, size).

    `tokens` is the token in each slot of the padded layout, -1 in padding (zeros); None: a slot for each token.
    """
    states = qkv.view(len(qkv), -1, heads.size)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    both = heads.query + heads.key_value
    rotated = states[:, :both].float()
    rotated = (rotated * cos + _rotate_half(rotated) * sin).to(qkv.dtype)
    parts = rotated[:, : heads.query], rotated[:, heads.query :], states[:, both:]
    query, key, value = (part.contiguous() if tokens is None else gather_rows(part, tokens) for part in parts)
    return query, key, value


@has_kernel("rope")
def rope_backward(
    query: Float[Tensor, "slots heads size"],
    key: Float[Tensor, "slots kv_heads size"],
    value: Float[Tensor, "slots kv_heads size"],
    cos: Float[Tensor, "tokens size"],
    sin: Float[Tensor, "tokens size"],
    slots: Int[Tensor, " tokens"] | None = None,
    *,
    keep: bool = True,
    column_scale: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "tokens columns"] | None, Fp8Rows | None]:
    """Return the gradient of [q | k | v] from the gradients of `rope`'s results.

    `slots` is the slot of each token, -1 for a token that has none.
    """
    parts = [part if slots is None else gather_rows(part, slots) for part in (query, key, value)]
    rotated = torch.cat(parts[:2], dim=1).float()
    # The inverse rotation: the sign of the angle changes.
    rotated = rotated * cos[:, None].float() - _rotate_half(rotated) * sin[:, None].float()
    d_qkv = torch.cat([rotated, parts[2].float()], dim=1).flatten(1)
    return d_qkv.to(query.dtype) if keep else None, None if column_scale is None else quantize_rows(d_qkv, column_scale)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@has_kernel("gates")
def activation(x: Float[Tensor, "rows columns"], kind: str) -> Float[Tensor, "rows columns"]:
    """Return the activation of this name, one of ACTIVATIONS."""
    return _activated(x.float(), kind).to(x.dtype)


@has_kernel("gates")
def activation_backward(
    dY: Float[Tensor, "rows columns"], x: Float[Tensor, "rows columns"], kind: str
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Return the gradient of x, and the result of `activation`; on a GPU they are written over the two arguments."""
    with torch.enable_grad():
        leaf = x.detach().float().requires_grad_()
        rows = _activated(leaf, kind)
        (dX,) = torch.autograd.grad(rows, leaf, dY.float())
    return dX.to(x.dtype), rows.detach().to(x.dtype)


def _activated(x: Tensor, kind: str) -> Tensor:
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return gelu(x, approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")


def draw_seeds(number: int, device: torch.device) -> Int[Tensor, " seeds"]:
    """Return seeds for dropout: the backward pass draws the same masks again, so that they need not be kept.

    They stay on the device: a CUDA graph draws new ones each time it is replayed.
    """
    return torch.randint(2**31 - 1, (number,), device=device)


@has_kernel("dropout")
def dropout(
    x: Float[Tensor, "rows columns"], seeds: Int[Tensor, " seeds"], p: float
) -> Float[Tensor, "seeds rows columns"]:
    """Return x with a share p of its numbers zeroed and the others divided by 1 - p, once for each seed."""
    return x * _mask(x, seeds, p)


@has_kernel("dropout")
def add_dropout(
    out: Float[Tensor, "rows columns"],
    parts: Float[Tensor, "seeds rows columns"],
    seeds: Int[Tensor, " seeds"],
    p: float,
) -> None:
    """Add each part to `out`, times the mask that `dropout` draws from its seed."""
    out += (parts * _mask(out, seeds, p)).sum(0)


def _mask(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    """Return a mask for each seed: 0 for what is dropped, 1 / (1 - p) for what is kept."""
    drawn = [torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return ((torch.stack(drawn) >= p) / (1 - p)).to(x.dtype)
