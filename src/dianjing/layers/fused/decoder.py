"""A decoder layer of an LLM as two autograd functions, before attention and after it, both passes written out.

It computes what transformers' layer computes, in fewer passes over memory, and keeps less for the backward pass: GEMMs
with the same input are one, what stands between GEMMs is one kernel, activations are recomputed, and gradients that are
added are added where one of them is made. The CPU starts such a layer in a fraction of the time. Only adapters train
here. README.md, one folder up, has the formulas and what is kept; families.py says whose layers are fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from dianjing.layers.attention import cached_attention, packed_attention, require_supported
from dianjing.layers.fp8 import Fp8Rows
from dianjing.layers.fused.families import family_of, linear_groups
from dianjing.layers.fused.linear import FusedLinear
from dianjing.layers.fused.ops import (
    Heads,
    gather_and_quantize,
    gather_rows,
    norm,
    norm_backward,
    qk_norm,
    qk_norm_backward,
    quantize_rows,
    rope,
    rope_backward,
    swiglu,
    swiglu_backward,
)
from dianjing.layers.padded import PaddedLayout, with_spare_tokens

States = tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"] | None]
"""The output of one layer for the next: x and y, whose sum the next norm makes. Both have the gradient of the sum."""


class PackLayout(NamedTuple):
    """Where the documents of a pack are, for attention."""

    cu_seqlens: Int32[Tensor, " documents_and_one"]
    max_seqlen: int
    padded: PaddedLayout | None


class CachedTokens(NamedTuple):
    """Where tokens are whose keys and values are kept: those of prompts, or the next one of each answer under way."""

    cache: Cache
    """Knows where each token's keys and values are written."""
    number: int
    """Tokens; what stands behind them is spare."""
    positions: Int[Tensor, " rows"] | None
    """Of the answers' tokens; None for prompts, which see themselves alone."""


def pack_layout(
    cu_seqlens: Int32[Tensor, " documents_and_one"], max_seqlen: int, padded: PaddedLayout | None, spare: int = 0
) -> PackLayout:
    """Return the layout of a pack with `spare` tokens behind it that belong to no document."""
    if padded is not None:
        return PackLayout(cu_seqlens, max_seqlen, with_spare_tokens(padded, spare))
    ends = torch.cat([cu_seqlens, cu_seqlens[-1:] + spare]) if spare else cu_seqlens
    return PackLayout(ends, max(max_seqlen, spare), None)


class FusedDecoderLayer:
    """A decoder layer on the tokens of a pack.

    X1 = X + Attention(RoPE(QKV(Norm(X)))) O', X2 = X1 + (silu(G) * U) D' with [G | U] = Norm(X1) [gate | up]'.
    """

    def __init__(self, layer: Any) -> None:
        family = family_of(layer)
        assert family
        attention = layer.self_attn
        self._layer = layer
        qkv, out, gate_up, down = linear_groups(layer)
        self.qkv, self.out = FusedLinear(qkv, augment=True), FusedLinear(out)
        self.gate_up, self.down = FusedLinear(gate_up, augment=True), FusedLinear(down)
        self.norm1, self.norm2 = (norm_of(getattr(layer, name)) for name in family.norms)
        self.qk_norms = [norm_of(getattr(attention, name)) for name in family.qk_norms or ()]
        self.window = family.window(attention)
        size, (queries, keys, _) = attention.head_dim, self.qkv.weights.widths
        self.heads = Heads(queries // size, keys // size, size)

    def __call__(
        self,
        states: States,
        cos: Float[Tensor, "tokens size"],
        sin: Float[Tensor, "tokens size"],
        pack: PackLayout,
        rows: Int[Tensor, " rows"] | None = None,
        cached: CachedTokens | None = None,
    ) -> States:
        """Return the layer's output; with `rows`, what follows attention is computed for these tokens only.

        Where `rows` has -1, the output means nothing. With `cached`, keys and values are kept.
        """
        if self._layer.gradient_checkpointing and torch.is_grad_enabled():
            return cast(States, checkpoint(self._run, (total(states), None), cos, sin, pack, rows, use_reentrant=False))
        return self._run(states, cos, sin, pack, rows, cached)

    def can_pad(self, longest: int) -> bool:
        """Return whether padded attention is exact for documents this long: no sliding window cuts them."""
        return not self.window or self.window >= longest

    def _run(
        self,
        states: States,
        cos: Tensor,
        sin: Tensor,
        pack: PackLayout,
        rows: Tensor | None,
        cached: CachedTokens | None = None,
    ) -> States:
        query, key, value, x = _BeforeAttention.apply(self, *states, cos, sin, pack.padded, *self.qkv.parameters)
        attended = None if cached is None else self._cached_attention(query, key, value, cached)
        if attended is None:
            attended = self._attention(query, key, value, pack)
        tokens, slots = (None, None) if pack.padded is None else (pack.padded.tokens.flatten(), pack.padded.slots)
        if rows is not None:
            taken = rows.clamp(min=0)
            x = x.index_select(0, taken)
            slots = (taken if slots is None else slots[taken]).where(rows >= 0, -1)
            tokens = _inverse(slots, len(attended))
        weights = [*self.out.parameters, *self.gate_up.parameters, *self.down.parameters]
        return cast(States, _AfterAttention.apply(self, x, attended, tokens, slots, *weights))

    def _cached_attention(self, query: Tensor, key: Tensor, value: Tensor, cached: CachedTokens) -> Tensor | None:
        """Keep keys and values; return attention's output for the next tokens of answers, None for prompts."""
        module, count = self._layer.self_attn, cached.number
        new = [part[:count].transpose(0, 1)[None] for part in (key, value)]
        keys, values = cached.cache.update(*new, layer_idx=cast(int, module.layer_idx))
        if cached.positions is None:
            return None
        require_supported(module, {}, keys.shape[2])
        output = cached_attention(
            query[:count, :, None], keys, values, cached.positions, module.scaling, self.window
        ).reshape(count, -1)
        return pad(output, (0, 0, 0, len(query) - count))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, pack: PackLayout) -> Tensor:
        """Return attention's output, a row for each of the queries."""
        module = self._layer.self_attn
        if pack.padded is not None:
            require_supported(module, {}, pack.max_seqlen)
            shape = pack.padded.tokens.shape
            q, k, v = (part.view(*shape, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
            grouped = q.shape[1] != k.shape[1]
            output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=module.scaling, enable_gqa=grouped)
            return output.transpose(1, 2).reshape(len(query), -1)
        q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
        output, _ = packed_attention(
            module,
            q,
            k,
            v,
            None,
            cu_seqlens=pack.cu_seqlens,
            max_seqlen=pack.max_seqlen,
            scaling=module.scaling,
            sliding_window=self.window,
        )
        return output.reshape(len(query), -1)


class _BeforeAttention(torch.autograd.Function):
    """X = x + y; [q | k | v] = QKV(Norm(X)), q and k normed (QK-norm) and rotated (RoPE); returns q, k, v and X.

    Backward: d[q | k | v] by the inverse rotation (and the backward of QK-norm), dN = d[q | k | v] W + dXA A, and
    dx = dy = dX + the backward of Norm on dN, where dX is the gradient that comes back past attention.
    Keeps X; with adapters Norm(X) and XA; with QK-norm [q | k | v] as QKV made it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layer: FusedDecoderLayer,
        x: Tensor,
        y: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        padded: PaddedLayout | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        qkv, seeds = layer.qkv, layer.qkv.draw_seeds()
        augmented = qkv.augmented(x)
        summed, N, fp8 = norm(x, *layer.norm1, y=y, keep=qkv.reads_rows, augmented=augmented, fp8=qkv.is_fp8)
        states, XA = qkv.forward(N, fp8, seeds, augmented)
        ctx.layer, ctx.seeds = layer, seeds
        tokens, slots = (None, None) if padded is None else (padded.tokens.flatten(), padded.slots)
        N, X = N if qkv.lora else None, x.view_as(x) if summed is None else summed
        ctx.save_for_backward(X, cos, sin, slots, N, XA, states if layer.qk_norms else None)
        if layer.qk_norms:
            states = qk_norm(states, *_qk_weights(layer))
        return *rope(states, cos, sin, layer.heads, tokens), X

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dX: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: FusedDecoderLayer = ctx.layer
        X, cos, sin, slots, N, XA, states = ctx.saved_tensors
        qkv, (weight, _, eps) = layer.qkv, layer.norm1
        dq, dk, dv, dX = (part.contiguous() for part in (dq, dk, dv, dX))
        if states is None:
            scale = qkv.weights.scale
            d_qkv, fp8 = rope_backward(dq, dk, dv, cos, sin, slots, keep=qkv.reads_rows, column_scale=scale)
        else:
            d_qkv, fp8 = _qk_norm_backward(layer, dq, dk, dv, cos, sin, slots, states)
        dXA = qkv.dXA(d_qkv)
        dN = qkv.dX(d_qkv, fp8, dXA, ctx.seeds)
        gradients = qkv.parameter_gradients(d_qkv, N, XA, dXA, ctx.seeds)
        dx, _ = norm_backward(dN, X, weight, eps, center=False, residual=dX)
        return None, dx, dx if ctx.needs_input_grad[2] else None, None, None, None, *gradients


def _qk_weights(layer: FusedDecoderLayer) -> tuple[Tensor, Tensor, Heads, float]:
    (q_weight, _, eps), (k_weight, _, _) = layer.qk_norms
    return q_weight, k_weight, layer.heads, eps


def _qk_norm_backward(
    layer: FusedDecoderLayer,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Fp8Rows | None]:
    """Return the gradient of [q | k | v] before QK-norm, and in FP8 for weights in FP8."""
    rotated, _ = rope_backward(dq, dk, dv, cos, sin, slots)
    assert rotated is not None
    d_qkv = qk_norm_backward(rotated, states, *_qk_weights(layer))
    scale = layer.qkv.weights.scale
    return d_qkv, None if scale is None else quantize_rows(d_qkv, scale)


class _AfterAttention(torch.autograd.Function):
    """X1 = x + attended O'; M = swiglu([G | U]), [G | U] = GateUp(Norm(X1)); returns X1 and M D', the layer's output.

    Backward, from the gradient dY of both: dM = dY D, d[G | U] and M again from dM and [G | U], dN = GateUp's dX,
    dX1 = dY + the backward of Norm on dN, which is dx, and d attended = dX1 O. Each of O, GateUp and D also gives its
    adapters' dA and dB.
    Keeps X1 and [G | U]; with adapters attended, Norm(X1) and the XA of all three.

    Attended may have other rows than x: `slots` is the row in it of each row of x, `tokens` the row of x of each of its
    rows, both with -1 for none.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layer: FusedDecoderLayer,
        x: Tensor,
        attended: Tensor,
        tokens: Tensor | None,
        slots: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, gate_up, down = layer.out, layer.gate_up, layer.down
        seeds = [linear.draw_seeds() for linear in (out, gate_up, down)]
        if out.is_fp8:
            taken, fp8 = gather_and_quantize(attended, slots, keep=out.reads_rows)
        else:
            taken, fp8 = attended if slots is None else gather_rows(attended, slots), None
        y, XA_out = out.forward(taken, fp8, seeds[0])
        keep, augmented = gate_up.reads_rows, gate_up.augmented(x)
        X1, N, fp8 = norm(x, *layer.norm2, y=y, keep=keep, augmented=augmented, fp8=gate_up.is_fp8)
        assert X1 is not None
        both, XA_both = gate_up.forward(N, fp8, seeds[1], augmented)
        y, XA_down = down.forward(*swiglu(both, keep=down.reads_rows, fp8=down.is_fp8), seeds[2])
        ctx.layer, ctx.seeds = layer, seeds
        # Rows taken from attention are taken again in the backward pass, unless FP8 weights leave room for both.
        again = out.lora is not None and slots is not None and not out.is_fp8
        kept = (attended if again else taken) if out.lora else None, N if gate_up.lora else None
        ctx.save_for_backward(tokens, slots if again else None, X1, both, *kept, XA_out, XA_both, XA_down)
        return X1, y

    @staticmethod
    def backward(ctx: Any, dY: Tensor, _same: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: FusedDecoderLayer = ctx.layer
        tokens, slots, X1, both, taken, N, XA_out, XA_both, XA_down = ctx.saved_tensors
        out, gate_up, down = layer.out, layer.gate_up, layer.down
        (weight, _, eps), dY = layer.norm2, dY.contiguous()

        dXA = down.dXA(dY)
        fp8 = None if down.weights.scale is None else quantize_rows(dY, down.weights.scale)
        dM = down.dX(dY, fp8, dXA, ctx.seeds[2])
        scale = gate_up.weights.scale
        d_both, fp8, M = swiglu_backward(
            dM, both, keep=gate_up.reads_rows, column_scale=scale, recompute=down.lora is not None
        )
        of_down = down.parameter_gradients(dY, M, XA_down, dXA, ctx.seeds[2])
        del M, dM

        dXA = gate_up.dXA(d_both)
        dN = gate_up.dX(d_both, fp8, dXA, ctx.seeds[1])
        of_gate_up = gate_up.parameter_gradients(d_both, N, XA_both, dXA, ctx.seeds[1])
        del d_both
        scale = out.weights.scale
        dX1, fp8 = norm_backward(dN, X1, weight, eps, center=False, residual=dY, column_scale=scale)

        dXA = out.dXA(dX1)
        d_attended = out.dX(dX1, fp8, dXA, ctx.seeds[0])
        taken = taken if slots is None else gather_rows(taken, slots)
        of_out = out.parameter_gradients(dX1, taken, XA_out, dXA, ctx.seeds[0])
        if tokens is not None:
            d_attended = gather_rows(d_attended, tokens)
        return None, dX1, d_attended, None, None, *of_out, *of_gate_up, *of_down


def _inverse(slots: Int[Tensor, " rows"], number: int) -> Int[Tensor, " slots"]:
    """Return the row in each of this many slots, -1 where none is; a row whose slot is -1 is in none."""
    rows = torch.arange(len(slots), device=slots.device)
    return slots.new_full((number + 1,), -1).index_copy_(0, slots.where(slots >= 0, number), rows)[:number]


def total(states: States) -> Float[Tensor, "rows hidden"]:
    """Return the sum that the next norm would make."""
    x, y = states
    return x if y is None else x + y


def norm_of(module: Any) -> tuple[Tensor, Tensor | None, float]:
    """Return weight, bias and epsilon of a norm."""
    eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
    return module.weight, getattr(module, "bias", None), eps


def fuse_decoder_layers(layers: Sequence[nn.Module]) -> list[FusedDecoderLayer] | None:
    """Return the layers fused, or None if one of them cannot be (families.py)."""
    return [FusedDecoderLayer(layer) for layer in layers] if all(map(family_of, layers)) else None
