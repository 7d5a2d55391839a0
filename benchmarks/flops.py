"""Useful floating-point operations of one training sample: what the model needs, nothing computed twice.

One multiply-add is two operations; causal attention counts half its square; frozen weights need no weight gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

TOWER_LAYERS, TOWER_WIDTH, TOWER_MLP, PATCHES = 23, 1024, 4096, 576
"""CLIP ViT-L/14-336 up to the layer that is read (feature_layer -2)."""
PATCH_INPUTS = 588


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A Llama-like LLM."""

    layers: int = 24
    hidden: int = 2048
    heads: int = 2048
    """Query heads times their size."""
    kv_heads: int = 1024
    mlp: int = 8192
    vocabulary: int = 92544

    @property
    def linear(self) -> int:
        """Parameters of the decoder's linear layers."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) + self.heads * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def fan(self) -> int:
        """Inputs and outputs of a decoder layer's seven linear layers, added up."""
        attention = 3 * self.hidden + self.heads + 2 * self.kv_heads + self.heads + self.hidden
        return attention + 3 * (self.hidden + self.mlp)


INTERNLM2_1_8B = Shapes()


def flops(
    shapes: Shapes,
    stage: int,
    tokens: float,
    tokens_squared: float,
    supervised: float,
    pictures: float,
    rank: int = 512,
    tower_rank: int = 64,
) -> float:
    """Return the operations of a sample; all counts are means over the samples.

    `tokens` counts image tokens too, `tokens_squared` is the mean of its square.
    """
    attention = 2 * tokens_squared * shapes.heads * shapes.layers
    forward = 2 * tokens * shapes.linear + attention
    gradient = 2 * tokens * shapes.linear + 2 * attention
    head = 4 * supervised * shapes.hidden * shapes.vocabulary
    positions = PATCHES + 1
    tower_linear = TOWER_LAYERS * 2 * positions * (4 * TOWER_WIDTH**2 + 2 * TOWER_WIDTH * TOWER_MLP)
    tower_attention = TOWER_LAYERS * 4 * positions**2 * TOWER_WIDTH
    width, hidden = TOWER_WIDTH, shapes.hidden
    picture = tower_linear + tower_attention + 2 * PATCHES * PATCH_INPUTS * width
    picture += 4 * PATCHES * (width * hidden + hidden**2) + 2 * PATCHES * hidden**2
    total = forward + gradient + head
    if stage == 2:
        total += 6 * tokens * rank * shapes.layers * shapes.fan
        tower_fan = 4 * 2 * TOWER_WIDTH + 2 * (TOWER_WIDTH + TOWER_MLP)
        picture += tower_linear + 2 * tower_attention + 6 * positions * TOWER_LAYERS * tower_rank * tower_fan
        picture += 2 * PATCHES * width * hidden
    return total + pictures * picture
