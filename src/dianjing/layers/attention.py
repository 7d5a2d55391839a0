"""Attention in which the records of a pack do not see each other: exact, and without a mask."""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dianjing.errors import ModelError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # some CPU builds of torch lack what it needs
    varlen_attn = None

SHARED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if varlen_attn and "enable_gqa" in signature(varlen_attn).parameters else {}
)
"""torch 2.11 has no such argument: its kernel takes fewer key-value heads unasked."""

PACKED = "dianjing_packed"
"""The name under which transformers knows it."""

UNREAD_MASK = torch.empty(1, 1, 1, 1)
"""Passed as attention_mask of a pack: transformers hands a 4D mask on as it is, where it would otherwise build
one of (tokens, tokens) that nothing reads."""


class Rectangle(NamedTuple):
    """Documents of nearly one length, one beside the other and filled up behind: the fastest kernels want it so."""

    rows: Int[Tensor, "documents longest"]
    """The token at each place; any token behind the end of a document."""
    filled: Bool[Tensor, "documents longest"]
    places: Int[Tensor, " tokens"]
    """Where each token is, in the rectangle as one row."""


def rectangle(
    cu_seqlens: Int32[Tensor, " documents_and_one"], position_ids: Int[Tensor, " tokens"], shape: tuple[int, int]
) -> Rectangle:
    """Return where the tokens of a pack are in a rectangle of `shape` (documents, longest)."""
    documents, longest = shape
    lengths = cu_seqlens.diff()
    begins = cu_seqlens.new_zeros(documents).index_copy(0, _upto(len(lengths), cu_seqlens), cu_seqlens[:-1])
    ends = begins.index_add(0, _upto(len(lengths), cu_seqlens), lengths)
    rows = begins[:, None] + _upto(longest, cu_seqlens)
    filled = rows < ends[:, None]
    document = torch.repeat_interleave(_upto(len(lengths), cu_seqlens), lengths, output_size=len(position_ids))
    return Rectangle(rows.where(filled, 0), filled, document * longest + position_ids)


def _upto(number: int, like: Tensor) -> Tensor:
    return torch.arange(number, device=like.device)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "one heads tokens size"],
    key: Float[Tensor, "one kv_heads tokens size"],
    value: Float[Tensor, "one kv_heads tokens size"],
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Int32[Tensor, " documents_and_one"] | None = None,
    max_seqlen: int = 0,
    rectangle: Rectangle | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Float[Tensor, "one tokens heads size"], None]:
    """Return causal attention within each document of a pack; without cu_seqlens, what "sdpa" returns.

    Raises:
        ModelError: the LLM's attention is of a kind that is not computed here.
    """
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    require_supported(module, settings, max_seqlen)
    window = settings.get("sliding_window") or max_seqlen
    if query.is_cuda and dropout == 0 and (dtype := _arithmetic(query)) != torch.float32:
        query, key, value = (states.to(dtype) for states in (query, key, value))
        if rectangle is not None and window >= max_seqlen:
            return in_rectangle(query, key, value, rectangle, scaling), None
        return _on_gpu(query, key, value, cu_seqlens, max_seqlen, scaling, window), None
    lengths = cu_seqlens.diff().tolist()
    # Measured: on a CPU a loop over documents beats padding them to one rectangle, and it needs no copies.
    outputs = [
        scaled_dot_product_attention(
            *document,
            attn_mask=(mask := _window_mask(document[0], window)),
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for document in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def require_supported(module: nn.Module, settings: dict[str, Any], max_seqlen: int) -> None:
    """Refuse attention that is not computed here, and positions that depend on the longest record of a pack."""
    if settings.get("softcap") is not None or settings.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: soft-capped attention and attention sinks are not supported; choose another LLM"
        )
    config: Any = getattr(module, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limit = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if max_seqlen > limit:
            raise ModelError(
                f"a record has {max_seqlen} positions, pictures included, but beyond {limit} this LLM's positions "
                f"({rope['rope_type']}) would change with the records beside it; lower data.max_tokens"
            )


def _window_mask(query: Tensor, window: int) -> Tensor | None:
    """Return which keys of a document each of its tokens sees; None where the window holds the whole of it."""
    size = query.shape[-2]
    if size <= window:
        return None
    return torch.ones(size, size, dtype=torch.bool, device=query.device).tril().triu(1 - window)


def _arithmetic(states: Tensor) -> torch.dtype:
    """Return what attention computes in: under autocast, rotary embeddings may have left fp32."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _on_gpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float | None, window: int
) -> Tensor:
    assert varlen_attn, "a GPU build of torch has it"
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, size)
    spans = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    reach = window - 1 if window < max_seqlen else -1
    output = varlen_attn(q, k, v, *spans, scale=scaling, window_size=(reach, 0), **SHARED_HEADS)
    assert isinstance(output, Tensor)
    return output[None]


def in_rectangle(
    query: Float[Tensor, "one heads tokens size"],
    key: Float[Tensor, "one kv_heads tokens size"],
    value: Float[Tensor, "one kv_heads tokens size"],
    places: Rectangle,
    scaling: float | None,
) -> Float[Tensor, "one tokens heads size"]:
    """Return causal attention within each document, computed side by side; what fills up is read by no token."""
    q, k, v = (into_rectangle(states[0].transpose(0, 1), *places).transpose(1, 2) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out_of_rectangle(output.transpose(1, 2), *places)[None]


def into_rectangle(states: Tensor, rows: Tensor, filled: Tensor, places: Tensor) -> Tensor:
    """Return states of tokens (tokens, ...) as (documents, longest, ...)."""
    return cast(Tensor, _IntoRectangle.apply(states, rows, places))


def out_of_rectangle(states: Tensor, rows: Tensor, filled: Tensor, places: Tensor) -> Tensor:
    """Return states of a rectangle (documents, longest, ...) as (tokens, ...)."""
    return cast(Tensor, _OutOfRectangle.apply(states, rows, filled, places))


class _IntoRectangle(torch.autograd.Function):
    """A gather whose backward pass is one too: no gradient comes from what fills up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        return states[rows]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return gradient.flatten(0, 1)[places], None, None


class _OutOfRectangle(torch.autograd.Function):
    """The way back, whose gradient is zero for what fills up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, filled: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows, filled)
        return states.flatten(0, 1)[places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        rows, filled = ctx.saved_tensors
        return gradient[rows] * filled[..., None, None], None, None, None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
