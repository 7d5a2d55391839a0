"""A file imports only what stands above it: one sample's way through the program is the reading order."""

from __future__ import annotations

import ast

import pytest

from tests.house.source import MODULES, Module

READING_ORDER = """
errors constants progress journal config.schema config.fields config.load model.hub tinyworld.folders
data.split data.read data.record data.sentencepiece data.chat_template data.template data.encode data.picture data.image
data.pack data.order data.collate data.source data.parallel data.survey data.cache data.dataset
model.language formats model.vision model.weights model.attention model.frozen model.kernels model.kernels_of_heads
model.kernels_of_products model.products model.fp8 model.passes model.lora model.linears model.joined model.joined_tower
model.build model.kernels_of_loss model.loss model.forward model.recorded model.stage model.compile model.adapter
plan
use.questions use.generate use.ask eval.score use.compare
train.interrupt train.state train.checkpoint train.watch train.log train.optim train.ranks
train.engine train.shards train.memory train.step train.samples train.loop train.launch
formats.run
use eval check export tinyworld make demo studio cli __main__
"""
"""From the bottom up; an entry is a file, or a package whose other files have no order among themselves.

Asking a model stands before training, since a run shows sample answers; loading a run to ask it stands after.
"""
ORDER = READING_ORDER.split()


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


@pytest.mark.parametrize("entry", ORDER)
def test_the_order_names_what_is_there(entry: str) -> None:
    assert any(entry_of(module.name) == entry for module in MODULES)


def test_an_import_the_wrong_way_is_seen() -> None:
    wrong = Module("data.pack", "pack.py", "def f():\n    from dianjing.data import dataset\n")
    assert violations(wrong) == ["data.pack imports data.dataset"]
