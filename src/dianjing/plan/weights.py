"""A recipe -> its model without numbers, with the memory of its weights: nothing is downloaded, loaded or allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.layers.fused.families import family_of
from dianjing.layers.nf4 import BLOCK_SIZE, num_bytes, num_parameters
from dianjing.model.build import assemble
from dianjing.model.folders import resolve
from dianjing.model.language import empty_language_model
from dianjing.model.stage import PARTS, PRECISIONS, apply_stage, held_as, part_of
from dianjing.model.towers.families import empty_tower, layers_of, prepared_size, tower_family
from dianjing.plan.shapes import Shapes, shapes_of

FP8_SCALE = ".scale"
"""How the names of an FP8 layer's scales end (layers/fp8.py)."""
SCALES_PER_BLOCK = 256
"""NF4's scales, in eight bits each, that share a scale of their own."""


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The LoRA of one layer, on average over the layers."""

    ranks: float = 0.0
    """Added up over the layer's linear layers."""
    inputs: float = 0.0
    """Of the linear layers, added up."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The memory of a run before its first pack."""

    shapes: Shapes
    parameters: Mapping[str, int]
    """Of each part: language_model, vision_tower, projector."""
    trainable: Mapping[str, int]
    frozen_bytes: Mapping[str, int]
    """By how they are held: "bf16", "nf4", ..."""
    layer_bytes: int
    """Of the decoder layer that takes most: what engines that shard weights gather at once."""
    decoder: Adapters
    tower: Adapters
    fused_decoder: bool = False
    """True if the decoder's layers are fused on a GPU (layers/fused/families.py), not compiled."""
    qk_norm: bool = False
    """True if fused decoder layers norm queries and keys."""
    fused_tower: bool = False

    @property
    def num_trainable(self) -> int:
        """Parameters that train, over all parts."""
        return sum(self.trainable.values())


def llm_folder(recipe: Recipe) -> Path:
    """Return the folder with the LLM's data files; of a model on the hub, no weights are downloaded for it."""
    return resolve(recipe.language_model.folder, "language_model", weights=False)


def empty_model(recipe: Recipe, dtype: torch.dtype) -> Any:
    """Return a recipe's model in its stage, made of two config.json alone; frozen weights are held in `dtype`.

    Raises:
        ModelError: a folder is not a model that can be used.
    """
    llm = empty_language_model(llm_folder(recipe), dtype)
    folder = resolve(recipe.vision_tower.folder, "vision_tower", weights=False)
    tower = empty_tower(folder, dtype)
    size, kind = prepared_size(folder, tower.config), recipe.projector.kind
    with torch.device("meta"):
        model: Any = assemble(llm, tower, 0, recipe.vision_tower.feature_layer, recipe.seed, kind=kind, size=size)
        model.to("meta")
        apply_stage(model, recipe)
    return model


def weights_of_recipe(recipe: Recipe) -> Weights:
    """Return what a recipe's weights will take, as `weights_of` would of the built model.

    Raises:
        ModelError: a folder is not a model that can be used.
    """
    model = empty_model(recipe, torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16)
    weights = weights_of(model)
    if not recipe.language_model.quantization:
        return weights
    plain = Counter(weights.frozen_bytes)
    layers: Any = model.model.language_model.layers
    quantized = [weight for layer in layers for weight in _quantized(layer)]
    held = recipe.language_model.quantization
    for weight in quantized:
        plain[PRECISIONS[weight.dtype]] -= weight.nbytes
        plain[held] += _bytes_as(held, weight)
    saved = max(sum(w.nbytes - _bytes_as(held, w) for w in _quantized(layer)) for layer in layers)
    fused = weights.fused_decoder and held != "nf4"
    return replace(weights, frozen_bytes=dict(plain), layer_bytes=weights.layer_bytes - saved, fused_decoder=fused)


def weights_of(model: LlavaForConditionalGeneration) -> Weights:
    """Return what a model holds, once a stage is applied to it."""
    frozen: Counter[str] = Counter()
    parameters: Counter[str] = Counter({part: 0 for part in PARTS})
    trainable: Counter[str] = Counter({part: 0 for part in PARTS})
    for name, weight in model.named_parameters():
        scale = name.endswith(FP8_SCALE)  # no parameter of the LLM, but a part of how it is held
        parameters[part_of(name)] += 0 if scale else num_parameters(weight)
        if weight.requires_grad:
            trainable[part_of(name)] += num_parameters(weight)
        else:
            frozen["fp8" if scale else held_as(weight)] += num_bytes(weight)
    decoder: Any = model.model.language_model
    tower: Any = model.model.vision_tower
    shapes = shapes_of(model)
    families = [family_of(layer) for layer in decoder.layers]
    return Weights(
        shapes=shapes,
        parameters=dict(parameters),
        trainable=dict(trainable),
        frozen_bytes=dict(frozen),
        layer_bytes=max(sum(map(num_bytes, layer.parameters())) for layer in decoder.layers),
        decoder=_adapters(decoder, shapes.layers),
        tower=_adapters(tower, shapes.tower_layers),
        fused_decoder=all(families),
        qk_norm=any(family.qk_norms for family in families if family),
        fused_tower=tower_family(tower.config).can_fuse(layers_of(tower)[: shapes.tower_layers]),
    )


def _adapters(part: nn.Module, layers: int) -> Adapters:
    found: list[Any] = [module for module in part.modules() if isinstance(module, LoraLayer)]
    ranks = sum(rank for module in found for rank in module.r.values())
    return Adapters(ranks=ranks / layers, inputs=sum(module.in_features for module in found) / layers)


def _quantized(layer: nn.Module) -> Iterable[Tensor]:
    """Yield the weights of a decoder layer that NF4 and FP8 are for."""
    for module in layer.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            yield module.weight


def _bytes_as(held: str, weight: Tensor) -> int:
    """Return what a matrix takes in NF4 or FP8, its scales included."""
    if held == "fp8":
        return weight.numel() + 4 * len(weight)
    blocks = -(-weight.numel() // BLOCK_SIZE)
    return weight.numel() // 2 + blocks + 4 * -(-blocks // SCALES_PER_BLOCK)
