"""`dianjing train RECIPE [--resume] [--section.field VALUE ...]`."""

from __future__ import annotations

import sys
from dataclasses import MISSING

from rich.console import Console
from rich.table import Table

from dianjing.config.fields import recipe_fields
from dianjing.config.load import as_toml, load_recipe
from dianjing.errors import ConfigError

NAME = "train"
SUMMARY = "train what a recipe says"
USAGE = "usage: dianjing train RECIPE [--resume] [--quiet] [--section.field VALUE ...]"
INTRODUCTION = """
RECIPE is a TOML file or the name of a shipped recipe (`dianjing recipes` lists them).
--resume goes on from the newest checkpoint of the recipe's output folder; --quiet prints errors only.
Every field of a recipe is a flag too, and wins over the file: --train.learning-rate 1e-3
"""


def run(arguments: list[str]) -> int:
    """Train, and return 0; or 128 and the signal's number when a signal stopped the run."""
    if not arguments or {"-h", "--help"} & set(arguments):
        _help()
        return 0 if arguments else 2
    path, switches, overrides = parse(arguments)
    recipe = load_recipe(path, overrides)

    from dianjing.train.interrupt import Stopped
    from dianjing.train.loop import train  # slow to import: a typing error in the recipe is said before

    try:
        train(recipe, resume="resume" in switches, quiet="quiet" in switches)
    except Stopped as stopped:
        print(f"{stopped}; go on with: dianjing train {path} --resume", file=sys.stderr)
        return stopped.exit_code
    return 0


def parse(arguments: list[str]) -> tuple[str, set[str], dict[str, str]]:
    """Return the recipe, the switches given, and the overrides by dotted field name.

    Raises:
        ConfigError: there is no recipe or more than one, or a flag has no value.
    """
    recipes: list[str] = []
    switches: set[str] = set()
    overrides: dict[str, str] = {}
    rest = iter(arguments)
    for word in rest:
        if word in ("--resume", "--quiet"):
            switches.add(word[2:])
        elif word.startswith("--"):
            flag, equals, value = word.partition("=")
            value = value if equals else next(rest, None)
            if value is None or (not equals and value.startswith("--")):
                raise ConfigError(f"{flag}: a value must follow; write {flag} VALUE")
            overrides[flag[2:].replace("-", "_")] = value
        else:
            recipes.append(word)
    if len(recipes) != 1:
        found = f"{len(recipes)} are given: {', '.join(recipes)}" if recipes else "none is given"
        raise ConfigError(f"one recipe is needed, {found}; {USAGE}")
    return recipes[0], switches, overrides


def _help() -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("field", "default", "meaning"):
        table.add_column(heading)
    for name, field in recipe_fields().items():
        default = "(required)" if field.default is MISSING else "" if field.default is None else as_toml(field.default)
        meaning = field.meaning or field.wanted
        table.add_row(f"--{name.replace('_', '-')}", default, meaning.partition("\n")[0])
    print(USAGE + "\n" + INTRODUCTION)
    Console(highlight=False).print(table, markup=False)
