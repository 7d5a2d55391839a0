"""Useful floating-point operations of one training sample: what the model needs, nothing computed twice.

One multiply-add is two operations; causal attention counts half its square; frozen weights need no weight gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from dianjing.config.schema import Recipe
from dianjing.plan.lengths import Lengths
from dianjing.plan.shapes import Shapes


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of an average sample, forwards and backwards."""

    useful: float
    frozen: float
    """The part of `useful` in the decoder's frozen linear layers, which FP8 makes faster."""
    again: float
    """The operations that activation checkpointing repeats; not in `useful`."""


def flops(shapes: Shapes, recipe: Recipe, lengths: Lengths) -> Flops:
    """Return the operations of an average sample of a run."""
    llm, tokens = recipe.language_model, lengths.tokens
    linear = 2 * tokens * shapes.linear
    attention = 2 * lengths.tokens_squared * shapes.heads * shapes.layers
    adapters = 2 * tokens * llm.lora_rank * shapes.layers * shapes.fan if llm.tuning == "lora" else 0.0
    head = 2 * lengths.supervised * shapes.hidden * shapes.vocabulary
    forward = linear + attention + adapters
    decoder = forward + linear + 2 * attention + 2 * adapters + 2 * head
    if llm.tuning == "full":
        decoder += linear + head
    tower_forward, pictures = _tower(shapes, recipe)
    again = forward * (shapes.layers - 1) / shapes.layers
    return Flops(
        useful=decoder + lengths.pictures * pictures,
        frozen=0.0 if llm.tuning == "full" else 2 * linear,
        again=again + lengths.pictures * (tower_forward if recipe.vision_tower.tuning != "frozen" else 0.0),
    )


def _tower(shapes: Shapes, recipe: Recipe) -> tuple[float, float]:
    """Return what a picture takes forwards in the tower, and in tower and projector forwards and backwards."""
    tuning, rank = recipe.vision_tower.tuning, recipe.vision_tower.lora_rank
    width, hidden, layers = shapes.tower_width, shapes.hidden, shapes.tower_layers
    linear = layers * 2 * shapes.positions * (4 * width**2 + 2 * width * shapes.tower_mlp)
    attention = layers * 4 * shapes.positions**2 * width
    adapters = 2 * shapes.positions * layers * rank * shapes.tower_fan if tuning == "lora" else 0.0
    forward = linear + attention + adapters
    embedding = 2 * shapes.patches * shapes.patch_inputs * width
    total = forward + embedding
    tokens = shapes.image_tokens
    total += 4 * (shapes.patches * width * hidden + tokens * hidden**2) + 2 * tokens * hidden**2
    if tuning != "frozen":
        total += linear + 2 * attention + 2 * adapters + 2 * shapes.patches * width * hidden
    if tuning == "full":
        total += linear + embedding
    return forward, total
