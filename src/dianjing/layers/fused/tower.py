"""Layers of a vision tower as two functions each, before attention and after it (see joined.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from dianjing.layers.fused.decoder import States, are_frozen, norm_of, to_adapters, total
from dianjing.layers.fused.linear import Linears, joinable
from dianjing.layers.fused.ops import ACTIVATIONS, activation, activation_backward, norm, norm_backward

TOWER_LAYERS = (CLIPEncoderLayer, SiglipEncoderLayer)
"""Layers that `JoinedTowerLayer` computes."""
ALIGNED = 8
"""A GPU multiplies rows of numbers in multiples of this fastest."""


class JoinedTowerLayer:
    """A layer of a vision tower on the patches of its pictures."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self.qkv = Linears([attention.q_proj, attention.k_proj, attention.v_proj], beside=True, keep=True)
        self.out = Linears([attention.out_proj], keep=True)
        self.first, self.second = Linears([mlp.fc1], beside=True, keep=True), Linears([mlp.fc2], keep=True)
        self.norm_before, self.norm_between = map(norm_of, (layer.layer_norm1, layer.layer_norm2))
        self.activation = attention.config.hidden_act
        self.size = attention.head_dim
        self._linears = (self.qkv, self.out, self.first, self.second)
        self.learns = any(linears.has_adapters for linears in self._linears)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make all that is made of the adapters, as they are now, where recorded work reads it."""
        for linears in self._linears:
            linears.refresh(dtype)

    def __call__(self, states: States, images: int) -> States:
        """Return the layer's output; the rows of so many pictures follow each other."""
        if self._layer.gradient_checkpointing and torch.is_grad_enabled():
            return cast(States, checkpoint(self._run, (total(states), None), images, use_reentrant=False))
        return self._run(states, images)

    def _run(self, states: States, images: int) -> States:
        query, key, value, x = _TowerBeforeAttention.apply(self, *states, *self.qkv.adapters)
        heads = (part.view(images, -1, x.shape[1] // self.size, self.size) for part in (query, key, value))
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads))
        attended = attended.transpose(1, 2).reshape(x.shape)
        weights = [*self.out.adapters, *self.first.adapters, *self.second.adapters]
        return cast(States, _TowerAfterAttention.apply(self, x, attended, *weights))


def embedded(
    embeddings: Any, pixel_values: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images states width"]:
    """Return what a tower's own embeddings return; patches do not overlap, and are rows of one product."""
    convolution = embeddings.patch_embedding
    weight, side = convolution.weight.flatten(1), convolution.kernel_size[0]
    images, channels, height, width = pixel_values.shape
    down, across = height // side, width // side
    numbers = weight.shape[1]
    spare = -numbers % ALIGNED
    patches = weight.new_zeros(images * down * across, numbers + spare)
    pixels = pixel_values[:, :, : down * side, : across * side].unflatten(3, (across, side)).unflatten(2, (down, side))
    places = patches[:, :numbers].unflatten(1, (channels, side, side)).unflatten(0, (images, down, across))
    places.copy_(pixels.permute(0, 2, 4, 1, 3, 5))
    states = linear(patches, pad(weight, (0, spare)), convolution.bias).view(images, down * across, len(weight))
    if hasattr(embeddings, "class_embedding"):  # CLIP; SigLIP has none
        states = torch.cat([embeddings.class_embedding.to(states.dtype).expand(images, 1, -1), states], dim=1)
    return states + embeddings.position_embedding.weight


def through_tower(
    layers: Sequence[JoinedTowerLayer], x: Float[Tensor, "images states width"]
) -> Float[Tensor, "images states width"]:
    """Return what the layers make of embedded pictures, one after the other."""
    # SigLIP's embeddings of one picture lie column by column.
    states: States = x.reshape(-1, x.shape[2]).contiguous(), None
    for layer in layers:
        states = layer(states, len(x))
    return total(states).view(x.shape)


class _TowerBeforeAttention(torch.autograd.Function):
    """x + y -> queries, keys, values side by side, and x + y."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: JoinedTowerLayer, x: Tensor, y: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        seeds = layer.qkv.draw_seeds()
        wide = layer.qkv.room_for(x)
        summed, entering, _ = norm(x, *layer.norm_before, y=y, wide=wide)
        states, inner = layer.qkv.forward(entering, None, seeds, wide)
        ctx.layer, ctx.seeds, x = layer, seeds, x.view_as(x) if summed is None else summed
        ctx.save_for_backward(x, entering if layer.qkv.has_adapters else None, inner)
        return *states.split(layer.qkv.widths, dim=1), x

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, beside: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: JoinedTowerLayer = ctx.layer
        x, entering, inner = ctx.saved_tensors
        qkv, (weight, _, eps), beside = layer.qkv, layer.norm_before, beside.contiguous()
        gradient = torch.cat([query, key, value], dim=1)
        to_inner = qkv.backward_inner(gradient)
        to_rows = qkv.backward_input(gradient, None, to_inner, ctx.seeds) if ctx.needs_input_grad[1] else None
        to_weights = to_adapters(qkv, gradient, entering, inner, to_inner, ctx.seeds)
        if to_rows is None:
            return None, None, None, *to_weights
        to_x, _ = norm_backward(to_rows, x, weight, eps, centre=True, beside=beside)
        return None, to_x, to_x if ctx.needs_input_grad[2] else None, *to_weights


class _TowerAfterAttention(torch.autograd.Function):
    """x, and what attention made of it -> the layer's output, as the two parts of a sum."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: JoinedTowerLayer, x: Tensor, attended: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        seeds = [linears.draw_seeds() for linears in (layer.out, layer.first, layer.second)]
        y, inner_out = layer.out.forward(attended, None, seeds[0])
        wide = layer.first.room_for(x)
        summed, entering, _ = norm(x, *layer.norm_between, y=y, wide=wide)
        assert summed is not None
        middle, inner_first = layer.first.forward(entering, None, seeds[1], wide)
        y, inner_second = layer.second.forward(activation(middle, layer.activation), None, seeds[2])
        ctx.layer, ctx.seeds = layer, seeds
        kept = (attended if layer.out.has_adapters else None, entering if layer.first.has_adapters else None)
        ctx.save_for_backward(*kept, summed, middle, inner_out, inner_first, inner_second)
        return summed, y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _same: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: JoinedTowerLayer = ctx.layer
        attended, entering, x, middle, inner_out, inner_first, inner_second = ctx.saved_tensors
        out, first, second = layer.out, layer.first, layer.second
        (weight, _, eps), gradient = layer.norm_between, gradient.contiguous()

        to_inner = second.backward_inner(gradient)
        to_active = second.backward_input(gradient, None, to_inner, ctx.seeds[2])
        to_middle, active = activation_backward(to_active, middle, layer.activation)
        to_second = to_adapters(second, gradient, active, inner_second, to_inner, ctx.seeds[2])

        to_inner = first.backward_inner(to_middle)
        to_rows = first.backward_input(to_middle, None, to_inner, ctx.seeds[1])
        to_first = to_adapters(first, to_middle, entering, inner_first, to_inner, ctx.seeds[1])
        to_x, _ = norm_backward(to_rows, x, weight, eps, centre=True, beside=gradient)

        to_inner = out.backward_inner(to_x)
        to_attended = out.backward_input(to_x, None, to_inner, ctx.seeds[0])
        to_out = to_adapters(out, to_x, attended, inner_out, to_inner, ctx.seeds[0])
        return None, to_x, to_attended, *to_out, *to_first, *to_second


def join_tower_layers(layers: Sequence[nn.Module]) -> list[JoinedTowerLayer] | None:
    """Return the layers joined, or None if one of them is of another kind or learns itself."""
    return [JoinedTowerLayer(layer) for layer in layers] if all(map(is_tower_layer, layers)) else None


def is_tower_layer(layer: Any) -> bool:
    """Return whether a layer is one that `JoinedTowerLayer` computes."""
    if type(layer) not in TOWER_LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    groups = (
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.out_proj],
        [mlp.fc1],
        [mlp.fc2],
    )
    plain = attention.config.hidden_act in ACTIVATIONS and attention.dropout == 0
    return plain and all(map(joinable, groups)) and are_frozen(layer.layer_norm1, layer.layer_norm2)
