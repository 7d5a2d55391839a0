"""Causal attention within each document of a pack: exact, and without a mask."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dianjing.errors import ModelError
from dianjing.layers.padded import PaddedLayout, pad_tokens, unpad_tokens

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # some CPU builds of torch lack what it needs
    varlen_attn = None

SHARED_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if varlen_attn and "enable_gqa" in signature(varlen_attn).parameters else {}
)
"""torch 2.11 lacks this argument: its kernel always takes fewer key-value heads than queries."""

PACKED = "dianjing_packed"
"""The name under which transformers finds it."""

UNREAD_MASK = torch.empty(1, 1, 1, 1)
"""Passed as attention_mask of a pack: transformers passes a 4D mask on unchanged, and would otherwise build one
of (tokens, tokens) that nothing reads."""


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "one heads tokens size"],
    key: Float[Tensor, "one kv_heads tokens size"],
    value: Float[Tensor, "one kv_heads tokens size"],
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Int32[Tensor, " documents_and_one"] | None = None,
    max_seqlen: int = 0,
    padded: PaddedLayout | None = None,
    query_positions: Int[Tensor, " rows"] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Float[Tensor, "one tokens heads size"], None]:
    """Return causal attention within each document of a pack; with neither spans nor positions, the result of "sdpa".

    With `query_positions`, it is that of one new token a row to the cached keys of its row (`cached_attention`).

    Raises:
        ModelError: the LLM's kind of attention is not supported.
    """
    if query_positions is not None:
        require_supported(module, settings, max_seqlen)
        return cached_attention(query, key, value, query_positions, scaling, settings.get("sliding_window")), None
    if cu_seqlens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    require_supported(module, settings, max_seqlen)
    window = settings.get("sliding_window") or max_seqlen
    if query.is_cuda and dropout == 0 and (dtype := _compute_dtype(query)) != torch.float32:
        query, key, value = (states.to(dtype) for states in (query, key, value))
        if padded is not None and window >= max_seqlen:
            return padded_attention(query, key, value, padded, scaling), None
        return _on_gpu(query, key, value, cu_seqlens, max_seqlen, scaling, window), None
    lengths = cu_seqlens.diff().tolist()
    # Measured: on a CPU a loop over documents is faster than padding them, and needs no copies.
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
    """Refuse kinds of attention that are not supported, and positions that depend on the longest record of a pack."""
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
                f"({rope['rope_type']}) would change with the other records of its pack; lower data.max_tokens"
            )


def _window_mask(query: Tensor, window: int) -> Tensor | None:
    """Return which keys each token of a document sees; None if the window spans the whole document."""
    size = query.shape[-2]
    if size <= window:
        return None
    return torch.ones(size, size, dtype=torch.bool, device=query.device).tril().triu(1 - window)


def _compute_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype attention computes in: under autocast, rotary embeddings may have left fp32."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _on_gpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float | None, window: int
) -> Tensor:
    assert varlen_attn, "every GPU build of torch has it"
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, size)
    spans = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    reach = window - 1 if window < max_seqlen else -1
    output = varlen_attn(q, k, v, *spans, scale=scaling, window_size=(reach, 0), **SHARED_HEADS)
    assert isinstance(output, Tensor)
    return output[None]


def padded_attention(
    query: Float[Tensor, "one heads tokens size"],
    key: Float[Tensor, "one kv_heads tokens size"],
    value: Float[Tensor, "one kv_heads tokens size"],
    layout: PaddedLayout,
    scaling: float | None,
) -> Float[Tensor, "one tokens heads size"]:
    """Return causal attention within each document, computed in the padded layout.

    Padding stands behind the tokens of its document, so that causal attention never reads it.
    """
    q, k, v = (pad_tokens(states[0].transpose(0, 1), *layout).transpose(1, 2) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return unpad_tokens(output.transpose(1, 2), *layout)[None]


def cached_attention(
    query: Float[Tensor, "rows heads 1 size"],
    key: Float[Tensor, "rows kv_heads reach size"],
    value: Float[Tensor, "rows kv_heads reach size"],
    positions: Int[Tensor, " rows"],
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "rows 1 heads size"]:
    """Return the attention of one token a row, at `positions`, to what is cached of its row up to itself.

    Heads that share a key-value head are the queries of one head here, so that no key is copied for each of them.
    """
    rows, heads, _, size = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], size).to(key.dtype)
    places = torch.arange(key.shape[2], device=key.device)
    seen = places <= positions[:, None]
    if window:
        seen &= places > positions[:, None] - window
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=seen[:, None, None], scale=scaling)
    return output.reshape(rows, 1, heads, -1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
