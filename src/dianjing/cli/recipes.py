"""`dianjing recipes [copy NAME [DEST]]`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dianjing.config.fields import nearest
from dianjing.config.load import shipped_recipes
from dianjing.errors import ConfigError

NAME = "recipes"
SUMMARY = "list the shipped recipes, or copy one to edit"


def run(arguments: list[str]) -> int:
    """List the recipes, or copy one."""
    parser = argparse.ArgumentParser(prog=f"dianjing {NAME}", description=SUMMARY)
    actions = parser.add_subparsers(dest="action", metavar="copy")
    copy = actions.add_parser("copy", help="copy a recipe, to be edited")
    copy.add_argument("name")
    copy.add_argument("dest", nargs="?", type=Path, default=Path(), help="file or folder (default: this folder)")
    given = parser.parse_args(arguments)
    if given.action == "copy":
        print(_copy(given.name, given.dest))
    else:
        _list()
    return 0


def _list() -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, path in shipped_recipes().items():
        table.add_row(name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "))
    Console().print(table)


def _copy(name: str, destination: Path) -> Path:
    shipped = shipped_recipes()
    if name not in shipped:
        offer = "".join(f"; did you mean '{other}'?" for other in nearest(name, shipped))
        raise ConfigError(f"{name}: no such shipped recipe; there are {', '.join(shipped)}{offer}")
    target = destination / f"{name}.toml" if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target}: it already exists; remove it, or name another file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first")
    shutil.copyfile(shipped[name], target)
    return target
