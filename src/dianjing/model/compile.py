"""Layers compiled once for all their copies: their many small operations become a few passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from dianjing.model.attention import into_rectangle, out_of_rectangle
from dianjing.model.forward import RECORDED, num_tower_layers, tower_states
from dianjing.model.fp8 import fp8_product
from dianjing.model.fp8_mlp import fp8_mlp
from dianjing.model.lora import adapted
from dianjing.model.recorded import Recorded

VARIANTS = 64
"""Forms of a layer's code that torch may keep: tower and decoder, with and without gradients, and spares."""


def compile_layers(model: LlavaForConditionalGeneration) -> None:
    """Let each layer run as compiled code from its next call on; packs may have any number of tokens."""
    # The compiler's front end takes these as one step; within, it mistakes the scopes of their two passes.
    for function in (fp8_product, fp8_mlp, adapted, into_rectangle, out_of_rectangle):
        torch.compiler.allow_in_graph(function)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    layers: Any = [
        *model.model.vision_tower.encoder.layers[: num_tower_layers(model)],
        *model.model.language_model.layers,
    ]
    for layer in layers:
        # Whether the weights are still the same modules is not asked at each call: nobody changes them.
        layer.compile(dynamic=True, options={"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe})
    tower: Any = model.model.vision_tower
    learning = [weight for weight in tower.parameters() if weight.requires_grad]
    frozen = not any(weight.requires_grad for weight in tower.embeddings.parameters())
    checkpointing = getattr(layers[0], "gradient_checkpointing", False)
    if model.device.type == "cuda" and learning and frozen and not checkpointing:
        setattr(tower, RECORDED, Recorded(partial(tower_states, model), learning))


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let the layers run as they are written: an answer grows word by word, and each length would be compiled."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
