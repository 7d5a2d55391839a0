"""TOML to Recipe and back: strictly, each error with the field and a way out."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Container, Iterator, Mapping
from dataclasses import MISSING
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from dianjing.config.fields import check, known_field, nearest, recipe_fields, sections
from dianjing.config.schema import Recipe
from dianjing.errors import ConfigError

RENAMED = {"language_model.frozen": "language_model.quantization"}
"""Names that fields had in the release before; they are still read, with a notice."""
BROUGHT = ("language_model.folder", "vision_tower.folder")
"""Fields that need not be given where start_from is."""


def load_recipe(path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Return the recipe in a TOML file, or the shipped recipe of that name.

    `overrides` holds values by dotted field name, which win over the file: {"train.learning_rate": 1e-3}.

    Raises:
        ConfigError: the recipe is not there or is not TOML, or a field in it is unknown, missing or of no use.
    """
    values = read_values(path)
    for name, value in (overrides or {}).items():
        flag = as_flag(name)
        values[name] = check(known_field(name, flag), value, flag)
    return complete_recipe(values, str(path))


def complete_recipe(values: dict[str, object], source: str) -> Recipe:
    """Return the recipe of checked values by dotted field name.

    Raises:
        ConfigError: one is missing, or two contradict each other; `source` is where they come from.
    """
    values = _with_start(values)
    _check_missing(values, source)
    recipe = make_recipe(values)
    _check_agreement(recipe, source)
    return recipe


def read_values(path: str | Path) -> dict[str, object]:
    """Return the values that a recipe gives, by dotted field name, each checked by itself.

    Raises:
        ConfigError: the recipe is not there or is not TOML, or a field in it is unknown or of no use.
    """
    source = find_recipe(path)
    try:
        table = tomllib.loads(source.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: not TOML: {error}") from None
    values: dict[str, object] = {}
    for name, value in _flatten(table, str(source)):
        field = known_field(today(name, str(source)), str(source))
        if field.name in values:
            raise ConfigError(f"{source}: {field.name} is given twice, by its old name too; remove {name}")
        values[field.name] = check(field, value, str(source))
    return _with_start(values)


def _with_start(values: dict[str, object]) -> dict[str, object]:
    """Return the values with the folders that start_from brings later left open."""
    return {**dict.fromkeys(BROUGHT, ""), **values} if values.get("start_from") else values


@cache
def today(name: str, where: str) -> str:
    """Return the name that a field has now, with a printed notice where it had another."""
    if name in RENAMED:
        print(f"notice: {where}: {name} is now called {RENAMED[name]}; rename it", file=sys.stderr)
    return RENAMED.get(name, name)


def as_flag(name: str) -> str:
    """Return the flag of a field: --train.learning-rate for "train.learning_rate"."""
    return f"--{name.replace('_', '-')}"


def find_recipe(path: str | Path) -> Path:
    """Return the file of a recipe that is given by path, or by name when it is a shipped one.

    Raises:
        ConfigError: there is no such file.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    reason = "a folder, not a recipe" if file.is_dir() else "there is no such recipe"
    offer = "".join(f"did you mean '{name}'? Give" for name in nearest(str(path), shipped)) or "give"
    raise ConfigError(f"{path}: {reason}; {offer} a TOML file or a shipped recipe: {', '.join(shipped)}")


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    folder = Path(str(files("dianjing.recipes")))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe, defaults included, so that `load_recipe` reads the same one."""
    writing = Path(f"{path}.writing")
    writing.write_text(recipe_text(recipe, recipe_fields()), encoding="utf-8")
    writing.replace(path)


def recipe_text(recipe: Recipe, always: Container[str]) -> str:
    """Return a recipe as TOML; of values that are the default, only those that `always` names."""
    lines: list[str] = []
    section = ""
    for name, value in flatten(recipe).items():
        before, _, key = name.rpartition(".")
        if value is None or (value == recipe_fields()[name].default and name not in always):
            continue
        if before != section:
            section = before
            lines += ["", f"[{section}]"]
        lines.append(f"{key} = {as_toml(value)}")
    return "\n".join(lines) + "\n"


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Return every value of a recipe by dotted field name, those outside sections first."""
    return {
        name: getattr(getattr(recipe, field.section) if field.section else recipe, field.key)
        for name, field in recipe_fields().items()
    }


def defaults() -> dict[str, Any]:
    """Return the defaults by dotted field name, as JSON has them; fields that a recipe must give are not there."""
    found = {name: field.default for name, field in recipe_fields().items() if field.default is not MISSING}
    return json.loads(json.dumps(found))


def make_recipe(values: Mapping[str, object]) -> Recipe:
    """Return the recipe of checked values by dotted field name; what is not given has its default."""
    groups: dict[str, dict[str, Any]] = {"": {}, **{section: {} for section in sections()}}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        groups[section][key] = value
    top = groups.pop("")
    return Recipe(**top, **{section: sections()[section](**group) for section, group in groups.items()})


def as_toml(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(as_toml(item) for item in cast(tuple[object, ...], value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def stop_after(stop_when: str) -> int | None:
    """Return N of train.stop_when = "no better for N", None for any other text."""
    found = re.fullmatch(r"no better for ([1-9][0-9]{0,8})", stop_when)
    return int(found[1]) if found else None


def _flatten(table: Mapping[str, Any], source: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if name not in sections():
            if isinstance(value, dict):
                offer = "".join(f"; did you mean [{other}]?" for other in nearest(name, sections()))
                raise ConfigError(f"{source}: unknown section [{name}]; there are {', '.join(sections())}{offer}")
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in cast(dict[str, object], value).items())
        else:
            raise ConfigError(f"{source}: '{name}' is a section; write [{name}] and its fields below")


def _check_missing(values: Mapping[str, object], source: str) -> None:
    for name, field in recipe_fields().items():
        if field.default is MISSING and name not in values:
            place = f"[{field.section}]" if field.section else "it"
            raise ConfigError(
                f"{source}: {place} lacks '{field.key}' ({field.wanted}); write it there or give {as_flag(name)}"
            )


def _check_agreement(recipe: Recipe, source: str) -> None:
    """Refuse fields that are fine alone and wrong together."""
    for section in ("language_model", "vision_tower"):
        tuning = getattr(recipe, section).tuning
        if recipe.stage == "pretrain" and tuning != "frozen":
            raise ConfigError(
                f'{source}: stage "pretrain" trains the projector alone, but {section}.tuning is "{tuning}"; '
                'set it to "frozen", or the stage to "finetune"'
            )
    if (held := recipe.language_model.quantization) and recipe.language_model.tuning == "full":
        raise ConfigError(
            f'{source}: language_model.tuning is "full", but language_model.quantization is "{held}" and quantized '
            'weights cannot train; set tuning to "lora", or quantization to ""'
        )
    if recipe.train.stop_when:
        if stop_after(recipe.train.stop_when) is None:
            raise ConfigError(
                f'{source}: train.stop_when is "{recipe.train.stop_when}"; write "no better for N", N in steps, or ""'
            )
        if not recipe.data.held_out:
            raise ConfigError(f"{source}: train.stop_when looks at the held-out loss; name records in data.held_out")
    if recipe.data.held_out and not recipe.train.probe_every:
        raise ConfigError(
            f"{source}: data.held_out names records, but train.probe_every is 0, so nothing would be measured; set it "
            "to -1, or above 0"
        )
    if recipe.train.sample_every and not recipe.train.sample_path:
        raise ConfigError(
            f"{source}: train.sample_every is {recipe.train.sample_every}, but train.sample_path names no records; "
            "name a LLaVA JSON with held-out records, or set sample_every to 0"
        )
