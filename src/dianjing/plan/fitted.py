"""Data and models -> the recipes of both stages: batch, epochs, rates and save points that fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dianjing.config.load import flatten, make_recipe, recipe_text
from dianjing.config.schema import Recipe, Stage
from dianjing.config.steps import fitting, steps_per_epoch
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.record import Record, load_records, without_markers
from dianjing.errors import DataError
from dianjing.plan.lengths import measured_lengths
from dianjing.plan.weights import llm_folder, weights_of_recipe

CAPTION_TYPES = {"caption", "description"}
"""Types that `dianjing make` gives to records for the first stage."""
ASKED_ALIKE = 0.2
"""Captions without a type are asked for in few ways: different questions are at most this share of the records."""
LINES, SAVES = 50, 4
"""Wanted in train.jsonl, and of checkpoints, where a run is short."""
PACK = 1024
"""data.pack_tokens is a multiple of this."""
ALWAYS = ("train.learning_rate", "train.global_batch_size", "train.epochs", "train.save_every", "train.log_every")
"""Fields that are written even where they have their default."""
MANY_STEPS = 1000
"""In a finetune of more, the projector keeps to LLaVA's low rate: it has been trained on as many captions."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The rates and the rank of LoRA that recipes for LLMs of a size have."""

    parameters: float
    """Size up to which these are taken."""
    pretrain: float
    finetune: float
    rank: int


RATES = (
    Rates(parameters=20e6, pretrain=5e-3, finetune=1e-3, rank=32),  # the tiny world's
    Rates(parameters=500e6, pretrain=2e-3, finetune=5e-4, rank=32),  # SmolLM2-135M's, in the real demo
    Rates(parameters=float("inf"), pretrain=1e-3, finetune=2e-4, rank=128),  # LLaVA's, from a billion on
)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A recipe, and the numbers that it was fitted to."""

    recipe: Recipe
    records: int
    steps: int
    llm_parameters: int


def divided(paths: Sequence[str]) -> dict[Stage, tuple[str, ...]]:
    """Return the data files of each stage: captions for the first and all others for the second, or all for both.

    Raises:
        DataError: a file cannot be read, or has no record that can be used.
    """
    captions = tuple(path for path in paths if _are_captions(path))
    others = tuple(path for path in paths if path not in captions)
    return {"pretrain": captions or others, "finetune": others or captions}


def _are_captions(path: str) -> bool:
    records = load_records(path, on_bad_record="skip").records
    if not records:
        raise DataError(f"{path}: no record there can be used; `dianjing check {path}` says why")
    types = {type_ for record in records for type_ in record.types}
    if types:
        return types <= CAPTION_TYPES
    different = len(set(_questions(records)))
    alike = different < len(records) and different <= max(ASKED_ALIKE * len(records), 1)
    return alike and all(len(record.turns) == 1 and record.images for record in records)


def _questions(records: Iterable[Record]) -> Iterable[str]:
    return (without_markers(turn.question) for record in records for turn in record.turns)


def fitted(values: Mapping[str, Any]) -> Fitted:
    """Return the recipe with these values by dotted field name, all others fitted to its data and models.

    Raises:
        DianjingError: a folder or the data cannot be used.
    """
    recipe = make_recipe(values)
    weights = weights_of_recipe(recipe)
    lengths = measured_lengths(recipe, llm_folder(recipe), FixedCount(weights.shapes.image_tokens))
    size = weights.parameters["language_model"]
    rates = next(rates for rates in RATES if size <= rates.parameters)
    batch, epochs = fitting(lengths.records, recipe.stage)
    steps = epochs * steps_per_epoch(lengths.records, batch)
    chosen: dict[str, Any] = {
        # Cut as the shipped recipes do it; the run counts the records.
        "data.on_long_record": "truncate",
        "data.pack_tokens": max(recipe.data.pack_tokens, -(-lengths.longest // PACK) * PACK),
        "train.learning_rate": rates.pretrain if recipe.stage == "pretrain" else rates.finetune,
        "train.global_batch_size": batch,
        "train.epochs": epochs,
        "train.log_every": min(recipe.train.log_every, max(steps // LINES, 1)),
        "train.save_every": min(recipe.train.save_every, -(-steps // SAVES)),
    }
    if recipe.stage == "finetune":
        chosen |= {
            "language_model.tuning": "lora",
            "language_model.lora_rank": rates.rank,
            "language_model.lora_alpha": 2.0 * rates.rank,
        }
        if steps > MANY_STEPS:
            chosen["projector.learning_rate"] = rates.finetune / 10
    if recipe.train.sample_path:
        chosen["train.sample_every"] = chosen["train.save_every"]
    return Fitted(
        recipe=make_recipe({**flatten(recipe), **chosen}), records=lengths.records, steps=steps, llm_parameters=size
    )


def as_text(found: Fitted, purpose: str) -> str:
    """Return a fitted recipe as TOML that says what its numbers come from; defaults are left out."""
    train = found.recipe.train
    lines = [
        f"# {purpose}",
        f"# Made by `dianjing recipes new`. {found.records:,} records, {train.epochs} epochs, batches of "
        f"{train.global_batch_size}: {found.steps:,} steps;",
        f"# rates for an LLM of {found.llm_parameters / 1e6:,.0f} million weights. All numbers are yours to change.",
    ]
    return "\n".join(lines) + "\n\n" + recipe_text(found.recipe, ALWAYS)
