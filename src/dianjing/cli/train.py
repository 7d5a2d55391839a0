"""`dianjing train RECIPE [--resume] [--gpus N] [--engine NAME] [--section.field VALUE ...]`."""

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
USAGE = "usage: dianjing train RECIPE [--resume] [--quiet] [--gpus N] [--engine NAME] [--section.field VALUE ...]"
SHORT = {"engine": "train.engine"}
INTRODUCTION = """
RECIPE is a TOML file or the name of a shipped recipe (`dianjing recipes` lists them).
--resume goes on from the newest checkpoint of the recipe's output folder; --quiet prints errors only.
--gpus N trains on N GPUs of this machine; several machines: torchrun --nnodes ... -m dianjing train RECIPE
--engine NAME is short for --train.engine: how the GPUs share weights, gradients and optimizer.
Every field of a recipe is a flag too, and wins over the file: --train.learning-rate 1e-3
"""


def run(arguments: list[str]) -> int:
    """Train, and return 0; or 128 and the signal's number when a signal stopped the run."""
    if not arguments or {"-h", "--help"} & set(arguments):
        _help()
        return 0 if arguments else 2
    gpus, arguments = take_gpus(arguments)
    path, switches, overrides = parse(arguments)
    recipe = load_recipe(path, overrides)
    if gpus is not None:
        from dianjing.train.launch import launch

        return launch(gpus, arguments)

    from dianjing.train.interrupt import Stopped
    from dianjing.train.loop import train  # slow to import: a typing error in the recipe is said before
    from dianjing.train.ranks import is_main, leave

    try:
        train(recipe, resume="resume" in switches, quiet="quiet" in switches)
    except Stopped as stopped:
        if is_main():
            print(f"{stopped}; go on with: dianjing train {path} --resume", file=sys.stderr)
        leave()
        return stopped.exit_code
    leave()
    return 0


def take_gpus(arguments: list[str]) -> tuple[int | None, list[str]]:
    """Return the number after --gpus, None without it, and the arguments without either.

    Raises:
        ConfigError: what follows --gpus is no whole number.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--gpus=") else [word])]
    if "--gpus" not in words:
        return None, arguments
    at = words.index("--gpus")
    number = "".join(words[at + 1 : at + 2])
    if not number.isdecimal():
        raise ConfigError("--gpus: a whole number must follow; write --gpus N")
    return int(number), words[:at] + words[at + 2 :]


def parse(arguments: list[str], usage: str = USAGE) -> tuple[str, set[str], dict[str, str]]:
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
            name = flag[2:].replace("-", "_")
            overrides[SHORT.get(name, name)] = value
        else:
            recipes.append(word)
    if len(recipes) != 1:
        found = f"{len(recipes)} are given: {', '.join(recipes)}" if recipes else "none is given"
        raise ConfigError(f"one recipe is needed, {found}; {usage}")
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
