"""The parameters that train in a stage, with the table that says so."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.table import Table
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import LanguageModelConfig, Recipe, VisionTowerConfig
from dianjing.language import say
from dianjing.layers.fp8 import Fp8Linear
from dianjing.layers.lora import LoraLinear
from dianjing.layers.nf4 import is_nf4, num_bytes, num_parameters
from dianjing.model.forward import CUDA_GRAPHS, num_tower_layers
from dianjing.model.towers.families import layers_of, tower_family

PARTS = {
    "language_model": ("model.language_model.", "lm_head."),
    "vision_tower": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
}
"""How the names of a part's parameters begin."""

HEAD = "lm_head"

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8"}

TRAINING_BYTES = 12
"""Bytes that training keeps of a parameter in addition to its weight: the gradient and AdamW's two means, in fp32."""


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One row of the table."""

    part: str
    tuning: str
    parameters: int
    trainable: int
    learning_rate: float | None
    """None when nothing of the part trains."""
    dtype: str
    """Of the weights that stay as they are; trainable ones are always fp32."""
    num_bytes: int
    """Of all its weights in memory."""


@dataclass(frozen=True)
class StageReport:
    """The parts that train and those that do not; rich prints it as a table."""

    stage: str
    parts: tuple[PartReport, ...]
    left_out: int = 0
    """Parameters of experts that get no adapter, since they are not linear layers but one tensor."""

    @property
    def trainable(self) -> int:
        """Parameters that train, over all parts."""
        return sum(part.trainable for part in self.parts)

    def __rich__(self) -> Table:
        title = say("stage {stage}: {number:,} parameters train", stage=self.stage, number=self.trainable)
        table = Table(title=title, title_justify="left", box=None)
        table.padding, table.pad_edge = (0, 2, 0, 0), False  # all of it in 80 columns, for a 7B LLM too
        for column in ("part", "tuning", "parameters", "trainable", "rate", "stored as", "memory"):
            table.add_column(say(column), justify="left" if column in ("part", "tuning") else "right")
        for row in self.parts:
            rate = "-" if row.learning_rate is None else f"{row.learning_rate:g}"
            numbers = f"{row.parameters:,}", f"{row.trainable:,}"
            table.add_row(row.part, row.tuning, *numbers, rate, row.dtype, in_units(row.num_bytes))
        weights, training = sum(row.num_bytes for row in self.parts), self.trainable * TRAINING_BYTES
        table.caption = say(
            "{weights} of weights, {training} of gradients and optimizer state",
            weights=in_units(weights),
            training=in_units(training),
        )
        if self.left_out:
            table.caption += "\n" + say(
                "the LLM's experts ({number} parameters) get no adapters and stay as they are",
                number=f"{self.left_out:,}",
            )
        table.caption_justify = "left"
        return table


def in_units(num_bytes: int) -> str:
    """Return a size in memory in words."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def apply_stage(model: LlavaForConditionalGeneration, recipe: Recipe) -> StageReport:
    """Freeze and unfreeze the model in place, give it its adapters, and report on it.

    Layers of the vision tower that the loss cannot reach never train. Weights that train are fp32.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        _tune_language_model(model, recipe.language_model)
        _tune_vision_tower(model, recipe.vision_tower)
    model.model.multi_modal_projector.requires_grad_(True)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(model.device, torch.float32)  # adapters of FP8 layers are made on the CPU
    if recipe.train.gradient_checkpointing == "on":
        checkpoint_activations(model)
    return _report(model, recipe)


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to, by the parameter's name."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def learning_rate(recipe: Recipe, part: str) -> float:
    """Return the learning rate of a part: its own, or else the run's."""
    own = getattr(recipe, part).learning_rate
    return recipe.train.learning_rate if own is None else own


def _tune_language_model(model: LlavaForConditionalGeneration, config: LanguageModelConfig) -> None:
    decoder = model.model.language_model
    if config.tuning == "full":
        decoder.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    elif config.tuning == "lora":
        targets = [*_linear_names(model, "model.language_model."), *([HEAD] if config.lora_head else [])]
        _add_lora(model, targets, config)
        if config.lora_share_qkv:
            _share_qkv(decoder)


def _tune_vision_tower(model: LlavaForConditionalGeneration, config: VisionTowerConfig) -> None:
    tower: Any = model.model.vision_tower
    family, num_layers = tower_family(tower.config), num_tower_layers(model)
    if config.tuning == "full":
        for name, weight in tower.named_parameters():
            weight.requires_grad_(not name.startswith(family.unused))
        family.layers(tower)[num_layers:].requires_grad_(False)
    elif config.tuning == "lora":
        layers = [f"{family.layers_name}.{number}." for number in range(num_layers)]
        _add_lora(tower, [name for layer in layers for name in _linear_names(tower, layer)], config)


def checkpoint_activations(model: LlavaForConditionalGeneration) -> None:
    """Let each layer keep only its input and compute the rest again in the backward pass, from the next pass on.

    Not the last decoder layer: its backward pass comes first, so that it would save no memory.
    """
    vars(model.model.vision_tower).pop(CUDA_GRAPHS, None)  # graphs keep all that they captured
    layers: Any = [*layers_of(model.model.vision_tower), *model.model.language_model.layers[:-1]]
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _linear_names(model: nn.Module, beginning: str) -> Iterator[str]:
    for name, module in model.named_modules():
        if name.startswith(beginning) and isinstance(module, nn.Linear | Fp8Linear):
            yield name


def _add_lora(model: nn.Module, targets: list[str], config: LanguageModelConfig | VisionTowerConfig) -> None:
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=config.lora_dropout,
        # A list would be matched by the ends of the names, which also fit elsewhere.
        target_modules="|".join(map(re.escape, targets)),
    )
    lora._register_custom_module({nn.Linear: LoraLinear, Fp8Linear: LoraLinear})  # a four-bit layer is a Linear
    with warnings.catch_warnings():
        # peft asks an FP8 layer for its sizes, and gets them.
        warnings.filterwarnings("ignore", "Unsupported layer type")
        inject_adapter_in_model(lora, model)


def _share_qkv(decoder: nn.Module) -> None:
    modules: Any = decoder.modules()
    for module in modules:
        if hasattr(module, "q_proj"):
            module.k_proj.lora_A = module.v_proj.lora_A = module.q_proj.lora_A


def _report(model: LlavaForConditionalGeneration, recipe: Recipe) -> StageReport:
    rows = []
    for part, beginnings in PARTS.items():
        weights = [weight for name, weight in model.named_parameters() if name.startswith(beginnings)]
        trainable = sum(weight.numel() for weight in weights if weight.requires_grad)
        frozen = {held_as(weight) for weight in weights if not weight.requires_grad}
        rows.append(
            PartReport(
                part=part.replace("_", " "),
                tuning=getattr(getattr(recipe, part), "tuning", "full"),
                parameters=sum(map(num_parameters, weights)),
                trainable=trainable,
                learning_rate=learning_rate(recipe, part) if trainable else None,
                dtype=", ".join(sorted(frozen)) or "-",
                num_bytes=sum(map(num_bytes, weights)),
            )
        )
    experts = 0
    if recipe.language_model.tuning == "lora":
        fused = (weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3)
        experts = sum(weight.numel() for weight in fused if not weight.requires_grad)
    return StageReport(recipe.stage, tuple(rows), experts)


def held_as(weight: nn.Parameter) -> str:
    """Return in words how a weight is held."""
    return "nf4" if is_nf4(weight) else PRECISIONS.get(weight.dtype, str(weight.dtype).removeprefix("torch."))
