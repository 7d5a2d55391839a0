"""Layers of a decoder as two functions each, before attention and after it, their passes written out both ways.

What transformers' layer computes, in fewer passes over memory and with fewer things kept: products of like inputs are
one, what stands between products is one kernel, activations are computed again in the backward pass instead of kept,
and a sum of gradients is made where one of them is. What a layer adds to its input is added by the next one's norm
(`States`). The CPU starts a layer in a fraction of the time. Nothing but
adapters learns here; a layer of another kind, or one that learns itself, stays as it is. joined_tower.py does the same
for vision towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from dianjing.layers.attention import Rectangle, packed_attention, require_supported
from dianjing.layers.fused.linear import Linears, Seeds, joinable
from dianjing.layers.fused.ops import (
    Heads,
    gated,
    gated_backward,
    norm,
    norm_backward,
    rotate,
    rotate_backward,
    spread,
    taken_rows,
    to_eight_bits,
)

DECODER_LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
"""Layers that `JoinedDecoderLayer` computes."""


States = tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"] | None]
"""What stands between two layers: a sum that is still to be made. The gradient of both parts is that of the sum."""


class Spans(NamedTuple):
    """Where the records of a pack are, as attention reads it."""

    cu_seqlens: Int32[Tensor, " documents_and_one"]
    max_seqlen: int
    beside: Beside | None


class Beside(NamedTuple):
    """Records side by side (see attention.py: Rectangle)."""

    shape: tuple[int, int]
    tokens: Int[Tensor, " places"]
    """Which token is at each place, -1 where none is."""
    places: Int[Tensor, " tokens"]
    """At which place each token is, -1 if it is of no record."""


def spans_of(
    cu_seqlens: Int32[Tensor, " documents_and_one"], max_seqlen: int, rectangle: Rectangle | None, spare: int = 0
) -> Spans:
    """Return where the records of a pack are, for all layers; `spare` tokens behind them are of no record."""
    if rectangle is None:
        ends = torch.cat([cu_seqlens, cu_seqlens[-1:] + spare]) if spare else cu_seqlens
        return Spans(ends, max(max_seqlen, spare), None)
    rows, filled, places = rectangle
    documents, longest = rows.shape
    beside = Beside((documents, longest), rows.where(filled, -1).flatten(), pad(places, (0, spare), value=-1))
    return Spans(cu_seqlens, max_seqlen, beside)


class JoinedDecoderLayer:
    """A decoder layer on the tokens of a pack."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self.qkv = Linears([attention.q_proj, attention.k_proj, attention.v_proj], beside=True, add=True)
        self.out = Linears([attention.o_proj], add=True)
        self.gate_up = Linears([mlp.gate_proj, mlp.up_proj], beside=True, add=True)
        self.down = Linears([mlp.down_proj], add=True)
        self.norm_before, self.norm_between = map(norm_of, (layer.input_layernorm, layer.post_attention_layernorm))
        size = attention.head_dim
        # Qwen2's attention has its own; a Llama's config may name one, which transformers does not apply.
        config = attention.config if type(layer) is MistralDecoderLayer else None
        self._window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        self.heads = Heads(self.qkv.widths[0] // size, self.qkv.widths[1] // size, size)

    def __call__(
        self,
        states: States,
        cos: Float[Tensor, "tokens size"],
        sin: Float[Tensor, "tokens size"],
        spans: Spans,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> States:
        """Return the layer's output, after its attention for some rows only if they are given.

        Where a row is -1, what is returned is of no use.
        """
        if self._layer.gradient_checkpointing and torch.is_grad_enabled():
            return cast(
                States, checkpoint(self._run, (total(states), None), cos, sin, spans, rows, use_reentrant=False)
            )
        return self._run(states, cos, sin, spans, rows)

    def may_stand_beside(self, longest: int) -> bool:
        """Return whether records of such a length may stand side by side: each token sees all before it."""
        return not self._window or self._window >= longest

    def _run(self, states: States, cos: Tensor, sin: Tensor, spans: Spans, rows: Tensor | None) -> States:
        query, key, value, x = _BeforeAttention.apply(self, *states, cos, sin, spans.beside, *self.qkv.adapters)
        attended = self._attention(query, key, value, spans)
        tokens, places = (None, None) if spans.beside is None else spans.beside[1:]
        if rows is not None:
            taken = rows.clamp(min=0)
            x = x.index_select(0, taken)
            places = (taken if places is None else places[taken]).where(rows >= 0, -1)
            tokens = _inverse(places, len(attended))
        weights = [*self.out.adapters, *self.gate_up.adapters, *self.down.adapters]
        return cast(States, _AfterAttention.apply(self, x, attended, tokens, places, *weights))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Return attention's output, a row for each of the queries."""
        module = self._layer.self_attn
        cu_seqlens, longest, beside = spans
        if beside is not None:
            require_supported(module, {}, longest)
            q, k, v = (part.view(*beside.shape, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
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
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            scaling=module.scaling,
            sliding_window=self._window,
        )
        return output.reshape(len(query), -1)


class _BeforeAttention(torch.autograd.Function):
    """x + y -> queries, keys, values, and x + y: the gradient of what goes past attention comes back here."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layer: JoinedDecoderLayer,
        x: Tensor,
        y: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        beside: Beside | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        qkv, seeds = layer.qkv, layer.qkv.draw_seeds()
        wide = qkv.room_for(x)
        summed, entering, eight = norm(x, *layer.norm_before, y=y, keep=_reads_rows(qkv), wide=wide, eight=qkv.eight)
        states, inner = qkv.forward(entering, eight, seeds, wide)
        ctx.layer, ctx.seeds = layer, seeds
        kept, x = entering if qkv.has_adapters else None, x.view_as(x) if summed is None else summed
        ctx.save_for_backward(x, cos, sin, None if beside is None else beside.places, kept, inner)
        return *rotate(states, cos, sin, layer.heads, None if beside is None else beside.tokens), x

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, beside: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: JoinedDecoderLayer = ctx.layer
        x, cos, sin, places, entering, inner = ctx.saved_tensors
        qkv, (weight, _, eps) = layer.qkv, layer.norm_before
        query, key, value, beside = (part.contiguous() for part in (query, key, value, beside))
        gradient, eight = rotate_backward(
            query, key, value, cos, sin, places, keep=_reads_rows(qkv), column_scale=qkv.scale
        )
        to_inner = None if gradient is None else qkv.backward_inner(gradient)
        to_rows = qkv.backward_input(gradient, eight, to_inner, ctx.seeds)
        to_weights = to_adapters(qkv, gradient, entering, inner, to_inner, ctx.seeds)
        to_x, _ = norm_backward(to_rows, x, weight, eps, centre=False, beside=beside)
        return None, to_x, to_x if ctx.needs_input_grad[2] else None, None, None, None, *to_weights


class _AfterAttention(torch.autograd.Function):
    """x, and what attention made of it -> the layer's output, as the two parts of a sum.

    Where attention's rows are not those of x: `places` of the rows of x among them, and which row is at each place.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        layer: JoinedDecoderLayer,
        x: Tensor,
        attended: Tensor,
        tokens: Tensor | None,
        places: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, gate_up, down = layer.out, layer.gate_up, layer.down
        seeds = [linears.draw_seeds() for linears in (out, gate_up, down)]
        taken, eight = taken_rows(attended, places, keep=_reads_rows(out), eight=out.eight)
        y, inner_out = out.forward(taken, eight, seeds[0])
        keep, wide = _reads_rows(gate_up), gate_up.room_for(x)
        summed, entering, eight = norm(x, *layer.norm_between, y=y, keep=keep, wide=wide, eight=gate_up.eight)
        assert summed is not None
        both, inner_both = gate_up.forward(entering, eight, seeds[1], wide)
        y, inner_down = down.forward(*gated(both, keep=_reads_rows(down), eight=down.eight), seeds[2])
        ctx.layer, ctx.seeds = layer, seeds
        again = _is_taken_again(out, places)
        kept = (attended if again else taken) if out.has_adapters else None, entering if gate_up.has_adapters else None
        ctx.save_for_backward(tokens, places if again else None, summed, both, *kept, inner_out, inner_both, inner_down)
        return summed, y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _same: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: JoinedDecoderLayer = ctx.layer
        tokens, places, x, both, taken, entering, inner_out, inner_both, inner_down = ctx.saved_tensors
        out, gate_up, down = layer.out, layer.gate_up, layer.down
        (weight, _, eps), gradient = layer.norm_between, gradient.contiguous()

        to_inner = down.backward_inner(gradient)
        eight = to_eight_bits(gradient, down.scale) if down.eight else None
        to_gated = down.backward_input(gradient, eight, to_inner, ctx.seeds[2])
        to_both, eight, again = gated_backward(
            to_gated, both, keep=_reads_rows(gate_up), column_scale=gate_up.scale, again=down.has_adapters
        )
        to_down = to_adapters(down, gradient, again, inner_down, to_inner, ctx.seeds[2])
        del again, to_gated

        to_inner = None if to_both is None else gate_up.backward_inner(to_both)
        to_rows = gate_up.backward_input(to_both, eight, to_inner, ctx.seeds[1])
        to_gate_up = to_adapters(gate_up, to_both, entering, inner_both, to_inner, ctx.seeds[1])
        del to_both
        to_x, eight = norm_backward(to_rows, x, weight, eps, centre=False, beside=gradient, column_scale=out.scale)

        to_inner = out.backward_inner(to_x)
        to_attended = out.backward_input(to_x, eight, to_inner, ctx.seeds[0])
        taken = taken if places is None else spread(taken, places)
        to_out = to_adapters(out, to_x, taken, inner_out, to_inner, ctx.seeds[0])
        if tokens is not None:
            to_attended = spread(to_attended, tokens)
        return None, to_x, to_attended, None, None, *to_out, *to_gate_up, *to_down


def _inverse(places: Int[Tensor, " rows"], number: int) -> Int[Tensor, " places"]:
    """Return which row each of so many places has, -1 where none is; a row whose place is -1 has none."""
    rows = torch.arange(len(places), device=places.device)
    return places.new_full((number + 1,), -1).index_copy_(0, places.where(places >= 0, number), rows)[:number]


def total(states: States) -> Float[Tensor, "rows hidden"]:
    """Return the sum that stands between two layers, or after the last one."""
    x, y = states
    return x if y is None else x + y


def to_adapters(
    linears: Linears,
    gradient: Tensor | None,
    entering: Tensor | None,
    inner: Tensor | None,
    to_inner: Tensor | None,
    seeds: Seeds,
) -> list[Tensor | None]:
    """Return the gradients of the layers' adapters, if they have any, for autograd to add."""
    if to_inner is None:
        return []
    assert gradient is not None
    assert entering is not None
    assert inner is not None
    return linears.backward_adapters(gradient, entering, inner, to_inner, seeds)


def _is_taken_again(out: Linears, places: Tensor | None) -> bool:
    """Return whether attention's answers are put in order again in the backward pass, instead of kept twice.

    FP8 weights leave room for both.
    """
    return out.has_adapters and places is not None and not out.eight


def _reads_rows(linears: Linears) -> bool:
    """Return whether what enters is read as it is, not in FP8 alone."""
    return linears.has_adapters or not linears.eight


def norm_of(module: Any) -> tuple[Tensor, Tensor | None, float]:
    """Return weight, bias and epsilon of a norm."""
    eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
    return module.weight, getattr(module, "bias", None), eps


def join_decoder_layers(layers: Sequence[nn.Module]) -> list[JoinedDecoderLayer] | None:
    """Return the layers joined, or None if one of them is of another kind or learns itself."""
    return [JoinedDecoderLayer(layer) for layer in layers] if all(map(is_decoder_layer, layers)) else None


def is_decoder_layer(layer: Any) -> bool:
    """Return whether a layer is one that `JoinedDecoderLayer` computes."""
    if type(layer) not in DECODER_LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    points = torch.linspace(-3, 3, 5)
    plain = torch.equal(mlp.act_fn(points), silu(points)) and getattr(attention, "attention_dropout", 0.0) == 0
    return plain and all(map(joinable, groups)) and are_frozen(layer.input_layernorm, layer.post_attention_layernorm)


def are_frozen(*modules: nn.Module) -> bool:
    """Return whether no weight of the modules learns."""
    return not any(weight.requires_grad for module in modules for weight in module.parameters())
