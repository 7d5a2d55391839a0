"""The project's own source files, parsed once for the house tests."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "dianjing"


@dataclass(frozen=True)
class Module:
    """One source file; `name` is without the leading "dianjing."."""

    name: str
    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


def _read(path: Path) -> Module:
    dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return Module(dotted.removesuffix(".__init__"), str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


MODULES = tuple(_read(path) for path in sorted(PACKAGE.rglob("*.py")))
