"""The form of a new recipe: all fields of the schema, what is read of it, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dianjing.config.fields import recipe_fields
from dianjing.config.load import flatten, load_recipe, save_recipe, shipped_recipes
from dianjing.errors import ConfigError
from dianjing.studio.recipes import form, plan, read_form, write
from tests.conftest import MakeRecipe


def filled(start: str | Path) -> dict[str, Any]:
    return {field["name"]: field["value"] for field in form(start)}


def test_the_form_has_every_field_of_the_schema() -> None:
    fields = {field["name"]: field for field in form()}
    assert list(fields) == list(recipe_fields())
    assert fields["stage"]["choices"] == ["pretrain", "finetune"]
    assert fields["data.path"]["lines"]
    assert fields["train.epochs"]["first"]
    assert not fields["train.betas"]["first"]
    assert fields["train.betas"]["value"] == "0.9, 0.999"
    assert all(field["meaning"] for field in fields.values())


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_unchanged_form_is_the_recipe_it_began_with(name: str, tmp_path: Path) -> None:
    recipe = read_form(filled(name))
    assert recipe == load_recipe(name)
    assert write(tmp_path, "mine", recipe) == "mine.toml"
    assert load_recipe(tmp_path / "mine.toml") == recipe


def test_several_files_are_lines(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(data={"path": ("a.json", "b b.json")})
    save_recipe(recipe, tmp_path / "two.toml")
    values = filled(tmp_path / "two.toml")
    assert values["data.path"] == "a.json\nb b.json"
    assert flatten(read_form(values))["data.path"] == ("a.json", "b b.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train.epochs": "two"}, 'the form: train.epochs = "two": a whole number is needed'),
        ({"train.epochs": "0"}, "train.epochs = 0: it must be at least 1"),
        ({"train.epoch": "2"}, "unknown field 'epoch'; did you mean 'epochs'?"),
        ({"train.betas": "0.9, x"}, "train.betas"),
        ({"stage": "pretain"}, 'did you mean "pretrain"'),
        ({"output": " "}, "lacks 'output'"),
        ({"train.sample_every": "5", "train.sample_path": ""}, "train.sample_path names no records"),
        ({"train.epochs": 3}, "train.epochs: a whole number is needed"),
    ],
)
def test_what_cannot_be_meant_is_said(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_form(filled("tinyworld_pretrain") | changed)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["", "../outside", "a b", "x" * 101])
def test_only_a_word_names_a_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name the recipe"):
        write(tmp_path, name, load_recipe("tinyworld_pretrain"))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("mine")
    with pytest.raises(ConfigError, match="it already exists"):
        write(tmp_path, "mine", load_recipe("tinyworld_pretrain"))
    assert (tmp_path / "mine.toml").read_text() == "mine"


def test_the_plan_of_a_form(make_recipe: MakeRecipe) -> None:
    found = plan(make_recipe())
    assert (found["records"], found["steps"]) == (8, 2)
    assert "only 2 optimizer steps" in found["few_steps"]
    assert all(one["needed"] > 0 for one in found["verdicts"])
