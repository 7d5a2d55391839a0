"""A file imports only what stands above it: one sample's way through the program is the reading order."""

from __future__ import annotations

import ast

import pytest

from tests.house.source import MODULES, Module

ORDER = (
    "errors",
    "constants",
    "config",
    "tinyworld.folders",
    "data.record",
    "data.template",
    "data.encode",
    "data.image",
    "data.pack",
    "data.order",
    "data.collate",
    "data.dataset",
    "model",
    "train",
    "use",
    "eval",
    "export",
    "tinyworld",
    "demo",
    "cli",
    "__main__",
)
"""From the bottom up; an entry is a package or, where the files of a package have an order too, a file."""


def entry_of(name: str) -> str:
    """Return the longest entry of ORDER that `name` is, or lies in; "" when there is none."""
    inside = [entry for entry in ORDER if name == entry or name.startswith(f"{entry}.")]
    return max(inside, key=len, default="")


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
    own = entry_of(module.name)
    return [
        f"{module.name} imports {other}"
        for other in sorted(imported(module))
        if entry_of(other) != own and ORDER.index(entry_of(other)) > ORDER.index(own)
    ]


@pytest.mark.parametrize("module", [m for m in MODULES if not m.is_package], ids=lambda module: module.name)
def test_imports_point_upwards(module: Module) -> None:
    assert entry_of(module.name), f"{module.path}: say in ORDER where this file stands"
    assert not violations(module)


def test_an_import_the_wrong_way_is_seen() -> None:
    wrong = Module("data.pack", "pack.py", "def f():\n    from dianjing.data import dataset\n")
    if "data.dataset" not in {module.name for module in MODULES}:
        pytest.skip("no data.dataset")
    assert violations(wrong) == ["data.pack imports data.dataset"]
