"""What makes a model's layers fast before a run: joined where they are of a known kind, compiled elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from dianjing.layers.attention import into_rectangle, out_of_rectangle
from dianjing.layers.cuda_graphs import Recorded
from dianjing.layers.fp8 import fp8_product
from dianjing.layers.fused.decoder import join_decoder_layers
from dianjing.layers.lora import adapted
from dianjing.model.forward import JOINED, RECORDED, num_tower_layers, tower_states
from dianjing.model.towers.families import family_of, layers_of

VARIANTS = 64
"""Forms of a layer's code that torch may keep: tower and decoder, with and without gradients, and spares."""


def speed_up(model: LlavaForConditionalGeneration, *, join: bool = True, record: bool = False) -> str:
    """Let layers be computed by joined.py, or else compiled from their next call on; return a line that says which.

    Without `join`, all are compiled: weights that ranks share are not where joined layers would look for them. With
    `record`, a tower whose adapters learn is recorded on a GPU and replayed (see recorded.py).
    """
    tower: Any = model.model.vision_tower
    decoder: Any = model.model.language_model
    said = []
    for part, name, layers, join_layers in (
        (decoder, "language model", decoder.layers, join_decoder_layers),
        (tower, "vision tower", layers_of(tower)[: num_tower_layers(model)], family_of(tower.config).fuse),
    ):
        if joined := join and join_layers(layers):
            setattr(part, JOINED, joined)
        else:
            compile_layers(layers)
        said.append(f"{name} {'joined' if joined else 'compiled'}")
    if record and model.device.type == "cuda" and may_record(model):
        weights = [weight for weight in tower.parameters() if weight.requires_grad]
        layers = getattr(tower, JOINED)

        def refresh() -> None:
            for layer in layers:
                layer.refresh(model.config.dtype)

        setattr(tower, RECORDED, Recorded(partial(tower_states, model), weights, refresh))
        said[-1] += " and replayed"
    return f"layers: {', '.join(said)}"


def may_record(model: LlavaForConditionalGeneration) -> bool:
    """Return whether the tower's work can be replayed: adapters alone learn, and nothing is made again."""
    tower: Any = model.model.vision_tower
    joined = getattr(tower, JOINED, None)
    checkpointing = getattr(layers_of(tower)[0], "gradient_checkpointing", False)
    return bool(joined) and joined[0].learns and not checkpointing


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Let each layer run as compiled code from its next call on; packs may have any number of tokens."""
    # The compiler's front end takes these as one step; within, it mistakes the scopes of their two passes.
    for function in (fp8_product, adapted, into_rectangle, out_of_rectangle):
        torch.compiler.allow_in_graph(function)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in layers:
        # Whether the weights are still the same modules is not asked at each call: nobody changes them.
        layer.compile(dynamic=True, options={"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe})


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let the layers run as they are written: an answer grows word by word, and each length would be compiled."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
