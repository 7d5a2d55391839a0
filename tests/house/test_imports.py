"""Folders import only folders above them, and no files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.house.source import MODULES, Module

READING_ORDER = """
errors constants extras language output console progress lock journal config layers pictures data formats run model plan
infer eval benchmark train importing serve check export start tinyworld doctor make demo studio cli __main__
"""
"""Folders, and the files beside them, from the bottom up: asking a model stands before training, since a run shows
sample answers."""
ORDER = READING_ORDER.split()
SHARE = 0.11
"""Of all lines: more than this in one folder is two folders. Folders within a folder count as their own."""


def folder_of(name: str) -> str:
    """Return the first part of a module's name."""
    return name.partition(".")[0]


def imported(module: Module) -> set[str]:
    """Return the project's modules that a file imports anywhere, functions included, without "dianjing."."""
    names = {other.name for other in MODULES if not other.is_package}
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.removeprefix("dianjing.") for name in found if name.startswith("dianjing.")} & names


def violations(module: Module) -> list[str]:
    own = ORDER.index(folder_of(module.name))
    return [
        f"{module.name} imports {other}" for other in sorted(imported(module)) if ORDER.index(folder_of(other)) > own
    ]


def circles(imports: dict[str, set[str]]) -> Iterator[str]:
    """Yield what is left when files that import nothing (left) are taken away, again and again."""
    left = {name: others & imports.keys() for name, others in imports.items()}
    while free := [name for name, others in left.items() if not others]:
        left = {name: others.difference(free) for name, others in left.items() if name not in free}
    yield from left


@pytest.mark.parametrize("module", [m for m in MODULES if not m.is_package], ids=lambda module: module.name)
def test_folders_import_what_stands_before_them(module: Module) -> None:
    assert folder_of(module.name) in ORDER, f"{module.path}: say in ORDER where this folder stands"
    assert not violations(module)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert not [*circles({module.name: imported(module) for module in MODULES if not module.is_package})]


@pytest.mark.parametrize("folder", ORDER)
def test_the_order_names_what_is_there(folder: str) -> None:
    assert any(folder_of(module.name) == folder for module in MODULES)


def test_no_folder_is_two() -> None:
    lines: dict[str, int] = {}
    for module in MODULES:
        folder = module.path.rpartition("/")[0]
        lines[folder] = lines.get(folder, 0) + module.text.count("\n")
    whole = sum(lines.values())
    assert not {folder: number for folder, number in lines.items() if number > SHARE * whole}


def test_an_import_the_wrong_way_is_seen() -> None:
    wrong = Module("data.pack", "pack.py", "def f():\n    from dianjing.model import build\n")
    assert violations(wrong) == ["data.pack imports model.build"]


def test_a_circle_is_seen() -> None:
    assert {*circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()})} == {"a", "b", "c"}
