"""A layer of a vision tower as two autograd functions, before attention and after it, as decoder.py has an LLM's."""

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

from dianjing.layers.fused.decoder import States, norm_of, total
from dianjing.layers.fused.families import are_frozen
from dianjing.layers.fused.linear import FusedLinear, can_fuse
from dianjing.layers.fused.ops import ACTIVATIONS, activation, activation_backward, norm, norm_backward

TOWER_LAYERS = (CLIPEncoderLayer, SiglipEncoderLayer)
"""Layers that `FusedTowerLayer` computes."""
ALIGNED = 8
"""A GPU multiplies rows of numbers in multiples of this fastest."""


class FusedTowerLayer:
    """A layer of a vision tower on the patches of its pictures.

    X1 = X + Attention(QKV(Norm(X))) O' + o, X2 = X1 + act(Norm(X1) F' + f) S' + s, with LayerNorm and biases.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._layer = layer
        qkv, out, fc1, fc2 = _linear_groups(layer)
        self.qkv, self.fc1 = (FusedLinear(group, augment=True, for_cuda_graph=True) for group in (qkv, fc1))
        self.out, self.fc2 = (FusedLinear(group, for_cuda_graph=True) for group in (out, fc2))
        self.norm1, self.norm2 = map(norm_of, (layer.layer_norm1, layer.layer_norm2))
        self.activation = attention.config.hidden_act
        self.size = attention.head_dim
        self._linears = (self.qkv, self.out, self.fc1, self.fc2)
        self.trains = any(linear.lora for linear in self._linears)

    def refresh(self, dtype: torch.dtype) -> None:
        """Make all copies of the adapters as they are now, where a CUDA graph reads them."""
        for part in self._linears:
            part.refresh(dtype)

    def __call__(self, states: States, images: int) -> States:
        """Return the layer's output; the rows of each of `images` pictures follow each other."""
        if self._layer.gradient_checkpointing and torch.is_grad_enabled():
            return cast(States, checkpoint(self._run, (total(states), None), images, use_reentrant=False))
        return self._run(states, images)

    def _run(self, states: States, images: int) -> States:
        query, key, value, x = _TowerBeforeAttention.apply(self, *states, *self.qkv.parameters)
        heads = (part.view(images, -1, x.shape[1] // self.size, self.size) for part in (query, key, value))
        attended = scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads))
        attended = attended.transpose(1, 2).reshape(x.shape)
        weights = [*self.out.parameters, *self.fc1.parameters, *self.fc2.parameters]
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
    layers: Sequence[FusedTowerLayer], x: Float[Tensor, "images states width"]
) -> Float[Tensor, "images states width"]:
    """Return what the layers make of embedded pictures, one after the other."""
    # SigLIP's embeddings of one picture lie column by column.
    states: States = x.reshape(-1, x.shape[2]).contiguous(), None
    for layer in layers:
        states = layer(states, len(x))
    return total(states).view(x.shape)


class _TowerBeforeAttention(torch.autograd.Function):
    """X = x + y; [q | k | v] = QKV(Norm(X)); returns q, k, v and X.

    Backward: dN = d[q | k | v] W + dXA A, and dx = dy = dX + the backward of Norm on dN, where dX is the gradient that
    comes back past attention. The first layer has no dx: pictures do not train.
    Keeps X; with adapters Norm(X) and XA.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: FusedTowerLayer, x: Tensor, y: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        seeds = layer.qkv.draw_seeds()
        augmented = layer.qkv.augmented(x)
        summed, N, _ = norm(x, *layer.norm1, y=y, augmented=augmented)
        states, XA = layer.qkv.forward(N, None, seeds, augmented)
        ctx.layer, ctx.seeds, X = layer, seeds, x.view_as(x) if summed is None else summed
        ctx.save_for_backward(X, N if layer.qkv.lora else None, XA)
        return *states.split(layer.qkv.weights.widths, dim=1), X

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dX: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: FusedTowerLayer = ctx.layer
        X, N, XA = ctx.saved_tensors
        qkv, (weight, _, eps), dX = layer.qkv, layer.norm1, dX.contiguous()
        d_qkv = torch.cat([dq, dk, dv], dim=1)
        dXA = qkv.dXA(d_qkv)
        dN = qkv.dX(d_qkv, None, dXA, ctx.seeds) if ctx.needs_input_grad[1] else None
        gradients = qkv.parameter_gradients(d_qkv, N, XA, dXA, ctx.seeds)
        if dN is None:
            return None, None, None, *gradients
        dx, _ = norm_backward(dN, X, weight, eps, center=True, residual=dX)
        return None, dx, dx if ctx.needs_input_grad[2] else None, *gradients


class _TowerAfterAttention(torch.autograd.Function):
    """X1 = x + attended O' + o; H = Norm(X1) F' + f; returns X1 and act(H) S' + s, the layer's output.

    Backward, from the gradient dY of both: dM = dY S, dH and act(H) again from dM and H, dN = dH F,
    dX1 = dY + the backward of Norm on dN, which is dx, and d attended = dX1 O. Each linear layer also gives its
    adapters' dA and dB.
    Keeps X1 and H; with adapters attended, Norm(X1) and the XA of all three.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: FusedTowerLayer, x: Tensor, attended: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        seeds = [part.draw_seeds() for part in (layer.out, layer.fc1, layer.fc2)]
        y, XA_out = layer.out.forward(attended, None, seeds[0])
        augmented = layer.fc1.augmented(x)
        X1, N, _ = norm(x, *layer.norm2, y=y, augmented=augmented)
        assert X1 is not None
        H, XA_fc1 = layer.fc1.forward(N, None, seeds[1], augmented)
        y, XA_fc2 = layer.fc2.forward(activation(H, layer.activation), None, seeds[2])
        ctx.layer, ctx.seeds = layer, seeds
        kept = (attended if layer.out.lora else None, N if layer.fc1.lora else None)
        ctx.save_for_backward(*kept, X1, H, XA_out, XA_fc1, XA_fc2)
        return X1, y

    @staticmethod
    def backward(ctx: Any, dY: Tensor, _same: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: FusedTowerLayer = ctx.layer
        attended, N, X1, H, XA_out, XA_fc1, XA_fc2 = ctx.saved_tensors
        out, fc1, fc2 = layer.out, layer.fc1, layer.fc2
        (weight, _, eps), dY = layer.norm2, dY.contiguous()

        dXA = fc2.dXA(dY)
        dM = fc2.dX(dY, None, dXA, ctx.seeds[2])
        dH, M = activation_backward(dM, H, layer.activation)
        of_fc2 = fc2.parameter_gradients(dY, M, XA_fc2, dXA, ctx.seeds[2])

        dXA = fc1.dXA(dH)
        dN = fc1.dX(dH, None, dXA, ctx.seeds[1])
        of_fc1 = fc1.parameter_gradients(dH, N, XA_fc1, dXA, ctx.seeds[1])
        dX1, _ = norm_backward(dN, X1, weight, eps, center=True, residual=dY)

        dXA = out.dXA(dX1)
        d_attended = out.dX(dX1, None, dXA, ctx.seeds[0])
        of_out = out.parameter_gradients(dX1, attended, XA_out, dXA, ctx.seeds[0])
        return None, dX1, d_attended, *of_out, *of_fc1, *of_fc2


def fuse_tower_layers(layers: Sequence[nn.Module]) -> list[FusedTowerLayer] | None:
    """Return the layers fused, or None if one of them is of another kind or trains itself."""
    return [FusedTowerLayer(layer) for layer in layers] if all(map(is_tower_layer, layers)) else None


def is_tower_layer(layer: Any) -> bool:
    """Return whether a layer is one that `FusedTowerLayer` computes."""
    if type(layer) not in TOWER_LAYERS:
        return False
    attention = layer.self_attn
    plain = attention.config.hidden_act in ACTIVATIONS and attention.dropout == 0
    return plain and all(map(can_fuse, _linear_groups(layer))) and are_frozen(layer.layer_norm1, layer.layer_norm2)


def _linear_groups(layer: Any) -> list[list[Any]]:
    """Return the linear layers of a tower layer, those with the same input together: qkv, out, fc1, fc2."""
    attention, mlp = layer.self_attn, layer.mlp
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [mlp.fc1], [mlp.fc2]]
