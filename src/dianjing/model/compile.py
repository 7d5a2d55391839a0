"""Layers compiled once for all their copies: their many small operations become a few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from dianjing.model.forward import num_tower_layers

VARIANTS = 64
"""Forms of a layer's code that torch may keep: tower and decoder, with and without gradients, and spares."""


def compile_layers(model: LlavaForConditionalGeneration) -> None:
    """Let each layer run as compiled code from its next call on; packs may have any number of tokens.

    Not the last decoder layer: it computes other rows after its attention than before (see forward.py).
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    layers: Any = [
        *model.model.vision_tower.encoder.layers[: num_tower_layers(model)],
        *model.model.language_model.layers[:-1],
    ]
    for layer in layers:
        layer.compile(dynamic=True)
