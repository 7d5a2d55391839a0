"""`dianjing recipes [copy NAME [DEST]]`: the recipes that come with the package."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.padding import Padding
from tyro.conf import Positional, arg

from dianjing.cli.flags import parse
from dianjing.config.fields import nearest
from dianjing.config.load import shipped_recipes
from dianjing.console import Console
from dianjing.errors import ConfigError

NAME = "recipes"
SUMMARY = "list the shipped recipes, or copy one to edit"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing recipes`."""

    action: Positional[Literal["list", "copy"]] = "list"
    """The action."""
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """The recipe to copy."""
    dest: Annotated[Positional[Path], arg(metavar="[DEST]")] = Path()
    """File or folder to copy it to; this folder if not given."""


def run(arguments: list[str]) -> int:
    """List the recipes, or copy one."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    if given.action == "copy":
        print(copy_shipped(shipped_recipes(), given.name, given.dest, "recipe"))
    else:
        _list()
    return 0


def _list() -> None:
    console = Console(highlight=False, markup=False)
    for name, path in shipped_recipes().items():
        purpose = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        console.print(name, style="bold")
        console.print(Padding(purpose, (0, 0, 0, 4)))


def copy_shipped(shipped: Mapping[str, Path], name: str, destination: Path, noun: str) -> Path:
    """Copy a file that comes with the package to a file or a folder, and return where it now is.

    Raises:
        ConfigError: there is no such file, or none may be written there.
    """
    if name not in shipped:
        wrong = f"{name}: no such shipped {noun}" if name else f"copy which {noun}?"
        offer = "".join(f"; did you mean '{other}'?" for other in nearest(name, shipped))
        raise ConfigError(f"{wrong}; there are {', '.join(shipped)}{offer}")
    target = destination / shipped[name].name if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target}: it already exists; remove it, or name another file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first")
    shutil.copyfile(shipped[name], target)
    return target
