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


def compile_layers(model: LlavaForConditionalGeneration, *, record: bool = True) -> None:
    """Let each layer run as compiled code from its next call on; packs may have any number of tokens.

    With `record`, a tower with adapters is recorded on a GPU and replayed (see recorded.py).
    """
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
    if record and model.device.type == "cuda" and may_record(model):
        tower: Any = model.model.vision_tower
        weights = [weight for weight in tower.parameters() if weight.requires_grad]
        setattr(tower, RECORDED, Recorded(partial(tower_states, model), weights))


def may_record(model: LlavaForConditionalGeneration) -> bool:
    """Return whether the tower's work can be replayed: adapters alone learn, and nothing is drawn or made again."""
    tower: Any = model.model.vision_tower
    learns = any(weight.requires_grad for weight in tower.parameters())
    whole = any(weight.requires_grad for weight in tower.embeddings.parameters())
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in tower.modules())
    checkpointing = getattr(tower.encoder.layers[0], "gradient_checkpointing", False)
    return learns and not (whole or draws or checkpointing)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let the layers run as they are written: an answer grows word by word, and each length would be compiled."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
