"""Changes to a recipe that does not fit, or to the packs of one that does."""

from __future__ import annotations

from collections.abc import Mapping

from dianjing.config.load import as_toml, flatten, make_recipe
from dianjing.config.schema import SHARDS_WEIGHTS, Recipe
from dianjing.plan.gpus import Gpu
from dianjing.plan.plan import Plan, Verdict, plan_of
from dianjing.plan.weights import weights_of_recipe

PACKS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024)
"""Sizes of packs that are tried; with larger ones a GPU gets no faster."""
RANKS = (256, 128, 64, 32, 16)
WORTH_IT = 1.03
"""Of its speed, below which a change is not worth a line."""
CHECKPOINTING = "train.gradient_checkpointing"

Change = Mapping[str, object]
"""Values by dotted field name."""


def changes(plan: Plan, gpu: Gpu) -> list[str]:
    """Return what would make a recipe fit that does not: each change that does alone, or else several together.

    The list is empty when nothing of the kind does.
    """
    ways = _ways(plan, gpu)
    alone = [next((option for option in way if fits(plan, gpu, option)), None) for way in ways]
    if any(alone):
        return [in_words(option) for option in alone if option]
    together: dict[str, object] = {}
    for way in ways:
        for option in way:
            if fits(plan, gpu, together | dict(option)):
                return [in_words(together | dict(option))]
        together |= way[-1]
    return []


def faster(plan: Plan, gpu: Gpu) -> tuple[str, float] | None:
    """Return the size of packs with which a recipe that fits is done sooner, as a change, and its samples a second.

    None when the recipe's own is the best.
    """
    open_choice = {CHECKPOINTING: "auto"} if plan.recipe.train.gradient_checkpointing == "on" else {}
    found: list[tuple[float, str]] = []
    for said in ("off", "on"):
        sizes = [size for size in PACKS if size >= plan.lengths.longest]
        fitting = (size for size in sizes if fits(plan, gpu, {"data.pack_tokens": size, CHECKPOINTING: said}))
        if size := next(fitting, 0):
            change = {"data.pack_tokens": size, **open_choice}
            verdict = verdict_of(plan, gpu, change)
            found += [(verdict.samples_per_second, in_words(change))] if verdict.fits else []
    best, words = max(found, default=(0.0, ""))
    return (words, best) if best > WORTH_IT * verdict_of(plan, gpu, {}).samples_per_second else None


def fits(plan: Plan, gpu: Gpu, change: Change) -> bool:
    """Return whether the changed recipe has room on a GPU."""
    return verdict_of(plan, gpu, change).fits


def verdict_of(plan: Plan, gpu: Gpu, change: Change) -> Verdict:
    """Return what is said of a GPU and the changed recipe."""
    recipe = changed(plan.recipe, change)
    same = not any(name.startswith(("language_model.", "vision_tower.")) for name in change)
    weights = plan.weights if same else weights_of_recipe(recipe)
    (verdict,) = plan_of(recipe, weights, plan.lengths, [gpu], plan.gpus).verdicts
    return verdict


def changed(recipe: Recipe, change: Change) -> Recipe:
    """Return the recipe with other values in it."""
    return make_recipe(flatten(recipe) | dict(change))


def in_words(change: Change) -> str:
    """Return a change as it is written in a recipe."""
    return ", ".join(f"{name} = {as_toml(value)}" for name, value in change.items())


def _ways(plan: Plan, gpu: Gpu) -> list[list[Change]]:
    """Return the fields that take less memory with other values, each with its values, the mildest first."""
    recipe, llm = plan.recipe, plan.recipe.language_model
    checkpointing = ["auto"] if recipe.train.gradient_checkpointing == "off" else []
    packs = [size for size in PACKS if max(plan.lengths.longest, 1) <= size < recipe.data.pack_tokens]
    engines = [] if llm.quantization or plan.gpus == 1 else ["deepspeed_zero2", "fsdp2"]
    may_freeze = recipe.train.engine not in SHARDS_WEIGHTS and recipe.train.precision != "fp32"
    held = [*(["fp8"] if gpu.fp8 else []), "nf4"] if may_freeze and llm.tuning != "full" else []
    ranks = [rank for rank in RANKS if rank < llm.lora_rank] if llm.tuning == "lora" else []
    values: dict[str, list] = {
        CHECKPOINTING: checkpointing,
        "data.pack_tokens": packs,
        "train.engine": engines if recipe.train.engine == "ddp" else [],
        "language_model.quantization": held if not llm.quantization else ["nf4"] if llm.quantization == "fp8" else [],
        "language_model.lora_rank": ranks,
        "language_model.tuning": ["lora"] if llm.tuning == "full" else [],
        "vision_tower.tuning": ["frozen"] if recipe.vision_tower.tuning != "frozen" else [],
    }
    return [[{name: value} for value in tried] for name, tried in values.items() if tried]
