"""Speeds up a model's layers before a run: fuses those of known families and compiles the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dianjing.layers.cuda_graphs import CudaGraphs
from dianjing.layers.fp8 import fp8_gemm
from dianjing.layers.fused.decoder import fuse_decoder_layers
from dianjing.layers.lora import lora_linear
from dianjing.layers.padded import pad_tokens, unpad_tokens
from dianjing.model.forward import CUDA_GRAPHS, FUSED, language_parts, num_tower_layers, tower_states
from dianjing.model.towers.families import layers_of, tower_family

VARIANTS = 64
"""Forms of a layer's code that torch may keep: tower and decoder, with and without gradients, and spares."""


def speed_up(model: LlavaForConditionalGeneration, *, fuse: bool = True, cuda_graphs: bool = False) -> str:
    """Fuse the layers of the decoder and of the tower, or compile them at their next call; return a line about it.

    Without `fuse`, all are compiled: fused layers do not find weights that ranks share. With `cuda_graphs`, a tower
    whose adapters train is captured on a GPU.
    """
    tower: Any = model.model.vision_tower
    if fuse:
        fuse_layers(model)
    said = []
    for part, name, layers in _parts(model):
        fused = hasattr(part, FUSED)
        if not fused:
            compile_layers(layers)
        said.append(f"{name} {'fused' if fused else 'compiled'}")
    if cuda_graphs and model.device.type == "cuda" and _can_capture(model):
        weights = [weight for weight in tower.parameters() if weight.requires_grad]
        layers = getattr(tower, FUSED)

        def refresh() -> None:
            for layer in layers:
                layer.refresh(model.config.dtype)

        setattr(tower, CUDA_GRAPHS, CudaGraphs(partial(tower_states, model), weights, refresh))
        said[-1] += " and in CUDA graphs"
    return f"layers: {', '.join(said)}"


def fuse_layers(model: PreTrainedModel) -> None:
    """Fuse the layers of the decoder, and of the tower of a LLaVA, where their families can be."""
    for part, _, layers in _parts(model):
        fuse = fuse_decoder_layers if part is language_parts(model)[0] else tower_family(part.config).fuse
        if fused := fuse(layers):
            setattr(part, FUSED, fused)


def _parts(model: PreTrainedModel) -> list[tuple[Any, str, Sequence[nn.Module]]]:
    """Return decoder and tower, each with its name and the layers that features or answers pass."""
    decoder: Any = language_parts(model)[0]
    parts = [(decoder, "language model", decoder.layers)]
    if isinstance(model, LlavaForConditionalGeneration):
        tower: Any = model.model.vision_tower
        parts.append((tower, "vision tower", layers_of(tower)[: num_tower_layers(model)]))
    return parts


def _can_capture(model: LlavaForConditionalGeneration) -> bool:
    """Return whether the tower's work can be replayed: only adapters train, and no layer is checkpointed."""
    tower: Any = model.model.vision_tower
    fused = getattr(tower, FUSED, None)
    checkpointing = getattr(layers_of(tower)[0], "gradient_checkpointing", False)
    return bool(fused) and fused[0].trains and not checkpointing


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile each layer at its next call; packs may have any number of tokens."""
    # The compiler's front end takes these as one step: inside, it confuses the scopes of their two passes.
    for function in (fp8_gemm, lora_linear, pad_tokens, unpad_tokens):
        torch.compiler.allow_in_graph(function)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in layers:
        # Do not check at each call that the layer's modules are still the same: nobody replaces them.
        layer.compile(dynamic=True, options={"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe})


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the layers uncompiled: an answer grows token by token, and each length would be compiled."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield
