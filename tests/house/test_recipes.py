"""Every shipped recipe can be read, says what it is, and is written back to the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from dianjing.config.load import load_recipe, save_recipe
from tests.house.source import PACKAGE

RECIPES = sorted((PACKAGE / "recipes").glob("*.toml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(str(path), {}) == load_recipe(path.stem, {})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_begins_with_a_sentence_on_itself(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_survives_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path), {})
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(str(tmp_path / "recipe.toml"), {}) == recipe
