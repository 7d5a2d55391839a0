"""A recipe and GPUs -> what the run will take and how long, before anything is downloaded, loaded or started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dianjing.config.schema import SHARDS_WEIGHTS, Recipe
from dianjing.data.picture_tokens import FixedCount
from dianjing.plan.flops import Flops, flops
from dianjing.plan.gpus import Gpu
from dianjing.plan.lengths import Lengths, measured_lengths, step_records
from dianjing.plan.memory import Memory, memory
from dianjing.plan.speed import SCALING, most_started, samples_per_second
from dianjing.plan.weights import Weights, llm_folder, weights_of_recipe


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One kind of GPU."""

    gpu: Gpu
    checkpointing: bool
    """True if activations are checkpointed: because they must be, or because the recipe says so."""
    needed: int
    """Bytes, on each GPU."""
    samples_per_second: float
    """Of all GPUs together; nan when the speed of this GPU is not known."""
    waits: bool = False
    """True if the GPU waits for the CPU that starts its work, which then decides the speed."""
    refused: str = ""
    """Why the recipe does not run there at all."""

    @property
    def fits(self) -> bool:
        """True if memory will do."""
        return not self.refused and self.needed <= self.gpu.num_bytes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of a recipe."""

    recipe: Recipe
    weights: Weights
    lengths: Lengths
    gpus: int
    plain: Memory
    """Without activation checkpointing."""
    checkpointed: Memory
    flops: Flops
    verdicts: tuple[Verdict, ...]

    @property
    def step_records(self) -> int:
        """Records of an optimizer step, over all GPUs."""
        return step_records(self.recipe, self.lengths)

    @property
    def records_per_pack(self) -> float:
        """Records in one forward and backward pass, on average."""
        return min(self.step_records / self.gpus, max(1.0, self.recipe.data.pack_tokens / self.lengths.tokens))

    @property
    def packs(self) -> int:
        """Packs of a step on each GPU."""
        return math.ceil(self.step_records / self.gpus / self.records_per_pack)

    @property
    def samples(self) -> int:
        """Samples of the whole run; 0 when the number of records is not known."""
        if self.recipe.train.max_steps:
            return self.recipe.train.max_steps * self.step_records
        return self.lengths.records * self.recipe.train.epochs


def make_plan(recipe: Recipe, gpus: Sequence[Gpu], number: int = 1) -> Plan:
    """Return what a recipe takes on `number` GPUs of each of these kinds; of models, only their data files are read.

    Raises:
        DianjingError: a folder or the data cannot be used.
    """
    weights = weights_of_recipe(recipe)
    lengths = measured_lengths(recipe, llm_folder(recipe), FixedCount(weights.shapes.image_tokens))
    return plan_of(recipe, weights, lengths, gpus, number)


def plan_of(recipe: Recipe, weights: Weights, lengths: Lengths, gpus: Sequence[Gpu], number: int = 1) -> Plan:
    """Return what a recipe with such weights and records takes."""
    compiled = recipe.train.compile != "off" and recipe.train.engine not in SHARDS_WEIGHTS
    plain, checkpointed = (
        memory(weights, recipe, lengths, checkpointing=on, compiled=compiled, gpus=number) for on in (False, True)
    )
    plan = Plan(
        recipe=recipe,
        weights=weights,
        lengths=lengths,
        gpus=number,
        plain=plain,
        checkpointed=checkpointed,
        flops=flops(weights.shapes, recipe, lengths),
        verdicts=(),
    )
    return replace(plan, verdicts=tuple(_verdict(plan, gpu) for gpu in gpus))


def _verdict(plan: Plan, gpu: Gpu) -> Verdict:
    said = plan.recipe.train.gradient_checkpointing
    on = said == "on" or (said == "auto" and plan.plain.total > gpu.num_bytes)
    quantization = plan.recipe.language_model.quantization
    speed = samples_per_second(
        plan.flops,
        plan.weights.shapes,
        plan.recipe,
        gpu,
        checkpointing=on,
        records=plan.step_records,
        packs=plan.packs,
        gpus=plan.gpus,
    )
    most = most_started(plan.weights.shapes, plan.recipe, records=plan.step_records, packs=plan.packs)
    return Verdict(
        gpu=gpu,
        waits=speed >= most * (SCALING if plan.gpus > 1 else 1),
        checkpointing=on,
        needed=(plan.checkpointed if on else plan.plain).total,
        samples_per_second=speed,
        refused="no FP8 units" if quantization == "fp8" and not gpu.fp8 and not math.isnan(gpu.bf16) else "",
    )
