"""The padded layout of a pack: its documents one per row, padded to one length.

Attention's fastest kernels want rows of equal length; everything else runs on the pack's tokens, one after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor
from torch.nn.functional import pad


class PaddedLayout(NamedTuple):
    """Where each token of a pack is in the padded layout, and the other way around.

    Documents of 3 and 2 tokens in the shape (2, 4): tokens [[0, 1, 2, -1], [3, 4, -1, -1]], slots [0, 1, 2, 4, 5].
    """

    tokens: Int[Tensor, "documents longest"]
    """The token in each slot; -1 in padding."""
    slots: Int[Tensor, " tokens"]
    """The slot of each token, counted row by row; -1 for a token of no document."""


def padded_layout(
    cu_seqlens: Int32[Tensor, " documents_and_one"], position_ids: Int[Tensor, " tokens"], shape: tuple[int, int]
) -> PaddedLayout:
    """Return the padded layout of a pack in `shape` (documents, longest); spare documents are all padding."""
    documents, longest = shape
    lengths = cu_seqlens.diff()
    begins = cu_seqlens.new_zeros(documents).index_copy(0, _arange(len(lengths), cu_seqlens), cu_seqlens[:-1])
    ends = begins.index_add(0, _arange(len(lengths), cu_seqlens), lengths)
    tokens = begins[:, None] + _arange(longest, cu_seqlens)
    document = torch.repeat_interleave(_arange(len(lengths), cu_seqlens), lengths, output_size=len(position_ids))
    return PaddedLayout(tokens.where(tokens < ends[:, None], -1), document * longest + position_ids)


def with_spare_tokens(layout: PaddedLayout, spare: int) -> PaddedLayout:
    """Return the layout of the same pack with tokens of no document behind it."""
    return PaddedLayout(layout.tokens, pad(layout.slots, (0, spare), value=-1))


def _arange(number: int, like: Tensor) -> Tensor:
    return torch.arange(number, device=like.device)


def pad_tokens(
    x: Float[Tensor, "tokens heads size"], tokens: Tensor, slots: Tensor
) -> Float[Tensor, "documents longest heads size"]:
    """Return x in the padded layout (`PaddedLayout`'s two tensors); padding holds numbers that nobody may read."""
    return cast(Tensor, _PadTokens.apply(x, tokens, slots))


def unpad_tokens(
    x: Float[Tensor, "documents longest heads size"], tokens: Tensor, slots: Tensor
) -> Float[Tensor, "tokens heads size"]:
    """Return padded x as the tokens of the pack, one after the other."""
    return cast(Tensor, _UnpadTokens.apply(x, tokens, slots))


class _PadTokens(torch.autograd.Function):
    """Y[slot] = X[token]; dX[token] = dY[slot]: both are gathers, for padding gives no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(slots)
        return x[tokens.clamp(min=0)]

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (slots,) = ctx.saved_tensors
        return dY.flatten(0, 1)[slots], None, None


class _UnpadTokens(torch.autograd.Function):
    """Y[token] = X[slot]; dX[slot] = dY[token], and zero in padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tokens)
        return x.flatten(0, 1)[slots]

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (tokens,) = ctx.saved_tensors
        return dY[tokens.clamp(min=0)] * (tokens >= 0)[..., None, None], None, None
