"""A new recipe: its form, made of the schema, and what a run with the form's values takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from dianjing.config.fields import RecipeField, check, known_field, recipe_fields, without_range
from dianjing.config.load import complete_recipe, read_values, recipe_text
from dianjing.config.schema import Recipe
from dianjing.config.steps import few_steps, total_steps
from dianjing.errors import ConfigError
from dianjing.model.folders import check_models

FORM = "the form"
COMMON = {
    *("language_model.tuning", "projector.init_from", "data.images", "train.learning_rate"),
    *("train.global_batch_size", "train.epochs", "train.save_every", "train.sample_every", "train.sample_path"),
}
"""Fields that are shown first, with those that a recipe must give."""
BOOLS = {"true": True, "false": False}
LONGEST = 20_000
"""Characters of a value."""


def form(start: str | Path = "") -> list[dict[str, Any]]:
    """Return every field of a recipe, with the value of an existing one or its default, as texts.

    Raises:
        ConfigError: the existing recipe cannot be used.
    """
    given = read_values(start) if start else {}
    return [
        {
            "name": name,
            "section": field.section,
            "key": field.key,
            "meaning": field.meaning,
            "wanted": field.wanted,
            "choices": _choices(field),
            "lines": any(get_args(kind)[:1] == (str,) for kind in field.kinds if get_origin(kind) is tuple),
            "value": _shown(given.get(name, "" if field.default is MISSING else field.default)),
            "first": field.default is MISSING or name in COMMON or name in given,
        }
        for name, field in recipe_fields().items()
    ]


def _choices(field: RecipeField) -> list[str]:
    kinds = [kind for kind in field.kinds if get_origin(kind) is Literal]
    return [str(choice) for kind in kinds for choice in get_args(kind)] or list(BOOLS) * (bool in field.kinds)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ("\n" if isinstance(value[0], str) else ", ").join(map(_shown, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_form(texts: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a filled form; a field that is left empty has its default.

    Raises:
        ConfigError: a value cannot be used, one is missing, or two contradict each other.
    """
    values: dict[str, object] = {}
    for name, text in texts.items():
        field = known_field(name, FORM)
        if not isinstance(text, str) or len(text) > LONGEST:
            raise ConfigError(f"{FORM}: {name}: {field.wanted} is needed")
        if text.strip():
            values[name] = check(field, _read(field, text.strip()), FORM)
    return complete_recipe(values, FORM)


def _read(field: RecipeField, text: str) -> object:
    """Return a text as the first of the field's types that it can be, or as it is: `check` then says what is wrong."""
    for kind in field.kinds:
        bare = without_range(kind)
        if get_origin(bare) is tuple and (get_args(bare)[0] is not str or "\n" in text):
            parts = re.split(r"\n" if get_args(bare)[0] is str else ",", text)
            return [_number(float, part.strip()) if get_args(bare)[0] is not str else part.strip() for part in parts]
        if bare is bool and text in BOOLS:
            return BOOLS[text]
        if bare in (int, float) and not isinstance(number := _number(bare, text), str):
            return number
    return text


def _number(kind: type, text: str) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        return text


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a run takes: its steps, and on each GPU the memory and the hours.

    Raises:
        DianjingError: a folder or the data cannot be used.
    """
    check_models(recipe, weights=False)
    from dianjing.plan.gpus import GPUS, gpu_here
    from dianjing.plan.plan import make_plan  # slow to import: torch
    from dianjing.plan.report import as_json

    here = gpu_here()
    made = make_plan(recipe, [here] if here else GPUS)
    records = made.lengths.records
    return {
        "records": records,
        "steps": total_steps(recipe, records),
        "few_steps": few_steps(recipe, records),
        "trainable": sum(made.weights.trainable.values()),
        "verdicts": as_json(made)["verdicts"],
    }


def write(folder: Path, name: str, recipe: Recipe) -> str:
    """Write a recipe into a folder, and return its file's name; nothing is written over.

    Raises:
        ConfigError: the name is not a word, or the file is there already.
    """
    if not re.fullmatch(r"[\w-]{1,100}", name):
        raise ConfigError("name the recipe by letters, digits, _ and -")
    file = folder / f"{name}.toml"
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(recipe_text(recipe, COMMON))
    except FileExistsError:
        raise ConfigError(f"{file.name}: it already exists; name the recipe otherwise") from None
    return file.name
