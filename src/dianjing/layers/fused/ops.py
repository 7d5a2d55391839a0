"""What a layer does between its matrix products, forwards and backwards: norms, rotary positions, activations, dropout.

On a GPU each is one kernel, one pass over memory (`kernels.py`, `kernels_of_heads.py`); elsewhere it is written in
torch's own operators, which say what the kernels compute and are what they are tested against. Sums are made in fp32.
`eight` asks for a result in FP8 too, with a scale for each row, and `column_scale` for the result times a number for
each column before that: the scales of the weights that it is multiplied with next.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float8e4m3fn, Int
from torch import Tensor
from torch.nn.functional import gelu, silu

from dianjing.layers.fp8 import FP8
from dianjing.layers.fp8 import quantized as _quantized

ACTIVATIONS = ("quick_gelu", "gelu_pytorch_tanh", "gelu")
"""Names, as in a model's config, of the activations that `activation` knows."""


class EightBits(NamedTuple):
    """A matrix in FP8: rows * scale."""

    rows: Float8e4m3fn[Tensor, "rows columns"]
    scale: Float[Tensor, "rows 1"]


def _room(rows: int, like: Tensor, columns: int = 0) -> EightBits:
    """Return room for so many rows, as wide as `like` unless `columns` are given, on its device."""
    wide = columns or like.shape[1]
    return EightBits(like.new_empty(rows, wide, dtype=FP8), like.new_empty(rows, 1, dtype=torch.float32))


def to_eight_bits(x: Float[Tensor, "rows columns"], column_scale: Float[Tensor, " columns"] | None = None) -> EightBits:
    """Return a matrix, times a number for each column, in FP8."""
    if x.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        eight = _room(len(x), x)
        kernels.quantize(x, None, column_scale, None, eight)
        return eight
    return EightBits(*_quantized(x.float() if column_scale is None else x.float() * column_scale))


def taken_rows(
    x: Float[Tensor, "rows columns"], taken: Int[Tensor, " taken"] | None, *, keep: bool = True, eight: bool = False
) -> tuple[Float[Tensor, "taken columns"] | None, EightBits | None]:
    """Return some rows of a matrix, or all of them, as they are and in FP8; zeros where `taken` has -1."""
    if not eight:
        return x if taken is None else spread(x, taken), None
    if x.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        number = len(x) if taken is None else len(taken)
        rows = x.new_empty(number, x.shape[1]) if keep and taken is not None else None
        in_eight = _room(number, x)
        kernels.quantize(x, taken, None, rows, in_eight)
        return x if keep and taken is None else rows, in_eight
    rows = x if taken is None else spread(x, taken)
    return rows if keep else None, to_eight_bits(rows)


def turned(matrix: Float8e4m3fn[Tensor, "rows columns"]) -> Float8e4m3fn[Tensor, "rows columns"]:
    """Return an FP8 matrix with its columns one after the other in memory, as the units want a product's second one."""
    eight = matrix.view(torch.uint8)
    if not matrix.is_cuda:
        return eight.T.contiguous().view(FP8).T
    from dianjing.layers.kernels import elementwise as kernels

    result = eight.new_empty(matrix.shape[1], matrix.shape[0])
    kernels.turn(eight, result)
    return result.view(FP8).T


class Wide(NamedTuple):
    """Rows inside of something wider."""

    whole: Float[Tensor, "rows wide"]
    left: int
    """Columns before those of the rows."""
    columns: int

    @property
    def rows(self) -> Float[Tensor, "rows columns"]:
        """The rows, where they lie."""
        return self.whole[:, self.left : self.left + self.columns]


class Norm(NamedTuple):
    """What `norm` returns; None for what was not asked for."""

    total: Float[Tensor, "rows columns"] | None
    """x + y."""
    rows: Float[Tensor, "rows columns"] | None
    eight: EightBits | None


def norm(
    x: Float[Tensor, "rows columns"],
    weight: Float[Tensor, " columns"],
    bias: Float[Tensor, " columns"] | None,
    eps: float,
    *,
    y: Float[Tensor, "rows columns"] | None = None,
    keep: bool = True,
    wide: Wide | None = None,
    eight: bool = False,
) -> Norm:
    """Return the norm of x + y by rows: RMS (arXiv 1910.07467) without a bias, else LayerNorm (arXiv 1607.06450).

    `wide` is where the rows go, if they are to lie in something wider.
    """
    if x.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        total, in_eight = None if y is None else torch.empty_like(x), _room(len(x), x) if eight else None
        if keep and wide is None:
            wide = Wide(torch.empty_like(x), 0, x.shape[1])
        kernels.norm(x, y, weight, bias, eps, total, wide, in_eight)
        return Norm(total, None if wide is None else wide.rows, in_eight)
    total = x if y is None else x + y
    rows = _normed(total.float(), weight.float(), None if bias is None else bias.float(), eps)
    kept, in_eight = rows.to(x.dtype) if keep else None, to_eight_bits(rows) if eight else None
    if kept is not None and wide is not None:
        kept = wide.rows.copy_(kept)
    return Norm(None if y is None else total, kept, in_eight)


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight
    return torch.nn.functional.layer_norm(x, x.shape[1:], weight, bias, eps)


def norm_backward(
    gradient: Float[Tensor, "rows columns"],
    x: Float[Tensor, "rows columns"],
    weight: Float[Tensor, " columns"],
    eps: float,
    *,
    centre: bool,
    beside: Float[Tensor, "rows columns"] | None = None,
    column_scale: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "rows columns"], EightBits | None]:
    """Return the gradient of what was normed (`centre`: by LayerNorm) plus `beside`; with column_scale in FP8 too."""
    if x.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        to_x, eight = torch.empty_like(x), None if column_scale is None else _room(len(x), x)
        kernels.norm_backward(
            gradient, x, weight, eps, centre=centre, beside=beside, to_x=to_x, column_scale=column_scale, eight=eight
        )
        return to_x, eight
    with torch.enable_grad():
        entering = x.detach().float().requires_grad_()
        bias = torch.zeros_like(weight, dtype=torch.float32) if centre else None
        rows = _normed(entering, weight.detach().float(), bias, eps)
        (to_x,) = torch.autograd.grad(rows, entering, gradient.float())
    to_x = (to_x if beside is None else to_x + beside.float()).to(x.dtype)
    return to_x, None if column_scale is None else to_eight_bits(to_x, column_scale)


def gated(
    gate_up: Float[Tensor, "rows both"], *, keep: bool = True, eight: bool = False
) -> tuple[Float[Tensor, "rows columns"] | None, EightBits | None]:
    """Return silu(gate) * up, where the two stand side by side."""
    if gate_up.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        columns = gate_up.shape[1] // 2
        rows = gate_up.new_empty(len(gate_up), columns) if keep else None
        result = rows, _room(len(gate_up), gate_up, columns) if eight else None
        kernels.gated(gate_up, *result)
        return result
    gate, up = gate_up.float().chunk(2, dim=1)
    rows = silu(gate) * up
    return rows.to(gate_up.dtype) if keep else None, to_eight_bits(rows) if eight else None


def gated_backward(
    gradient: Float[Tensor, "rows columns"],
    gate_up: Float[Tensor, "rows both"],
    *,
    keep: bool = True,
    column_scale: Float[Tensor, " both"] | None = None,
    again: bool = False,
) -> tuple[Float[Tensor, "rows both"] | None, EightBits | None, Float[Tensor, "rows columns"] | None]:
    """Return the gradients of gate and up, with column_scale in FP8 too, and with `again` what `gated` returned.

    On a GPU the two of the size of an argument are written over it.
    """
    if gate_up.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        eight = None if column_scale is None else _room(len(gate_up), gate_up)
        result = gate_up if keep else None, eight, gradient if again else None
        kernels.gated_backward(gradient, gate_up, column_scale, *result)
        return result
    with torch.enable_grad():
        entering = gate_up.detach().float().requires_grad_()
        gate, up = entering.chunk(2, dim=1)
        rows = silu(gate) * up
        (to_both,) = torch.autograd.grad(rows, entering, gradient.float())
    return (
        to_both.to(gate_up.dtype) if keep else None,
        None if column_scale is None else to_eight_bits(to_both, column_scale),
        rows.detach().to(gate_up.dtype) if again else None,
    )


class Heads(NamedTuple):
    """How the columns of queries, keys and values are cut."""

    query: int
    key_value: int
    size: int


def rotate(
    qkv: Float[Tensor, "tokens columns"],
    cos: Float[Tensor, "tokens size"],
    sin: Float[Tensor, "tokens size"],
    heads: Heads,
    rows: Int[Tensor, " places"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys turned by their positions (arXiv 2104.09864), and values: each (places, heads, size).

    `rows` says which token is at each place, -1 where none is (zeros); None: places are tokens.
    """
    number = len(qkv) if rows is None else len(rows)
    if qkv.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        counts = (heads.query, heads.key_value, heads.key_value)
        query, key, value = (qkv.new_empty(number, count, heads.size) for count in counts)
        kernels_of_heads.rotate(qkv, cos, sin, rows, query, key, value)
        return query, key, value
    states = qkv.view(len(qkv), -1, heads.size)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    both = heads.query + heads.key_value
    turned_ = states[:, :both].float()
    turned_ = (turned_ * cos + _half_turned(turned_) * sin).to(qkv.dtype)
    parts = turned_[:, : heads.query], turned_[:, heads.query :], states[:, both:]
    query, key, value = (part.contiguous() if rows is None else spread(part, rows) for part in parts)
    return query, key, value


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def spread(x: Float[Tensor, "rows ..."], rows: Int[Tensor, " places"]) -> Float[Tensor, "places ..."]:
    """Return the row of x that is at each place, zeros where `rows` has -1."""
    if x.is_cuda:
        from dianjing.layers.kernels import elementwise as kernels

        result = x.new_empty(len(rows), *x.shape[1:])
        kernels.spread(x, rows, result)
        return result
    if not len(x):
        return x.new_zeros(len(rows), *x.shape[1:])
    return x[rows.clamp(min=0)] * (rows >= 0).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def rotate_backward(
    query: Float[Tensor, "places heads size"],
    key: Float[Tensor, "places kv_heads size"],
    value: Float[Tensor, "places kv_heads size"],
    cos: Float[Tensor, "tokens size"],
    sin: Float[Tensor, "tokens size"],
    places: Int[Tensor, " tokens"] | None = None,
    *,
    keep: bool = True,
    column_scale: Float[Tensor, " columns"] | None = None,
) -> tuple[Float[Tensor, "tokens columns"] | None, EightBits | None]:
    """Return the gradient of what `rotate` was given, from those of its results.

    `places` says where each token was put, -1 where it was left out.
    """
    if query.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        columns = (query.shape[1] + 2 * key.shape[1]) * query.shape[2]
        to_qkv = query.new_empty(len(cos), columns) if keep else None
        eight = None if column_scale is None else _room(len(cos), cos, columns)
        kernels_of_heads.rotate_backward(query, key, value, cos, sin, places, column_scale, to_qkv, eight)
        return to_qkv, eight
    states = [states if places is None else spread(states, places) for states in (query, key, value)]
    turned_ = torch.cat(states[:2], dim=1).float()
    # The other way around: the angle's sign changes.
    turned_ = turned_ * cos[:, None].float() - _half_turned(turned_) * sin[:, None].float()
    both = torch.cat([turned_, states[2].float()], dim=1).flatten(1)
    return both.to(query.dtype) if keep else None, None if column_scale is None else to_eight_bits(both, column_scale)


def _activated(x: Tensor, kind: str) -> Tensor:
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return gelu(x, approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")


def activation(x: Float[Tensor, "rows columns"], kind: str) -> Float[Tensor, "rows columns"]:
    """Return the activation of that name."""
    if x.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        rows = torch.empty_like(x)
        kernels_of_heads.activation(x, kind, rows)
        return rows
    return _activated(x.float(), kind).to(x.dtype)


def activation_backward(
    gradient: Float[Tensor, "rows columns"], x: Float[Tensor, "rows columns"], kind: str
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Return the gradient of x, and what `activation` returned; on a GPU they are written over the two arguments."""
    if x.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        kernels_of_heads.activation(x, kind, x, gradient, gradient)
        return gradient, x
    with torch.enable_grad():
        entering = x.detach().float().requires_grad_()
        rows = _activated(entering, kind)
        (to_x,) = torch.autograd.grad(rows, entering, gradient.float())
    return to_x.to(x.dtype), rows.detach().to(x.dtype)


def draw_seeds(number: int, device: torch.device) -> Int[Tensor, " seeds"]:
    """Return seeds of dropouts: the backward pass draws the same numbers again instead of keeping them.

    They stay on the device. Work that is recorded there draws others each time it is replayed.
    """
    return torch.randint(2**31 - 1, (number,), device=device)


def dropped(
    x: Float[Tensor, "rows columns"], seeds: Int[Tensor, " seeds"], share: float
) -> Float[Tensor, "seeds rows columns"]:
    """Return x with a share of its numbers dropped, the others made up for it; once for each seed."""
    if x.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        result = x.new_empty(len(seeds), *x.shape)
        kernels_of_heads.drop(x, result, seeds, share)
        return result
    return x * _kept(x, seeds, share)


def add_dropped(
    into: Float[Tensor, "rows columns"],
    parts: Float[Tensor, "seeds rows columns"],
    seeds: Int[Tensor, " seeds"],
    share: float,
) -> None:
    """Add to a tensor in place what dropout leaves of each part: of the numbers that `dropped` would, by its seed."""
    if into.is_cuda:
        from dianjing.layers.kernels import heads as kernels_of_heads

        kernels_of_heads.add_dropped(parts, into, seeds, share)
    else:
        into += (parts * _kept(into, seeds, share)).sum(0)


def _kept(x: Tensor, seeds: Tensor, share: float) -> Tensor:
    """Return what each number is multiplied with: nothing, or what makes up for the others."""
    drawn = [torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
    return ((torch.stack(drawn) >= share) / (1 - share)).to(x.dtype)
