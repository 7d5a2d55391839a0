"""Whatever recipe can be written in code can be saved and is read back as the same recipe."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dianjing.cli.flags import parse_with_recipe
from dianjing.cli.train import Arguments
from dianjing.config.fields import RecipeField, recipe_fields
from dianjing.config.load import load_recipe, make_recipe, save_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SHARE = st.floats(0, 1, exclude_max=True)


def values_of(field: RecipeField, kind: Any) -> SearchStrategy:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind == tuple[str, ...]:
        return st.lists(TEXT, min_size=1).map(tuple)
    if get_origin(kind) is tuple:
        return st.tuples(*(values_of(field, inner) for inner in get_args(kind)))
    if get_origin(kind) is Annotated:
        bare, allowed = get_args(kind)
        few = st.integers(0, 9) if bare is int else SHARE
        many = st.integers(1, 2**40) if bare is int else st.floats(1, allow_infinity=False)
        return few.filter(allowed.holds) | (many if allowed.holds(2) else st.nothing())
    return {str: TEXT, bool: st.booleans(), NoneType: st.none(), int: st.integers(-9, 2**40)}[kind]


def values() -> SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {name: st.one_of(*(values_of(field, kind) for kind in field.kinds)) for name, field in recipe_fields().items()}
    )


@settings(max_examples=60, deadline=None)
@given(values())
def test_saved_and_read_back(drawn: dict[str, Any]) -> None:
    for section in ("language_model", "vision_tower") if drawn["stage"] == "pretrain" else ():
        drawn[f"{section}.tuning"] = "frozen"
    if drawn["language_model.tuning"] == "full":
        drawn["language_model.quantization"] = ""
    drawn["train.sample_path"] += "x"
    drawn["data.held_out"] += "x"
    drawn["train.probe_every"] = 1
    if drawn["train.stop_when"]:
        drawn["train.stop_when"] = "no better for 3"
    recipe = make_recipe(drawn)
    with tempfile.TemporaryDirectory() as folder:
        save_recipe(recipe, Path(folder) / "recipe.toml")
        assert load_recipe(Path(folder) / "recipe.toml") == recipe


@settings(max_examples=60, deadline=None)
@given(st.text(string.printable, max_size=12))
def test_any_text_can_be_a_flags_value(text: str) -> None:
    given = parse_with_recipe(Arguments, ["tinyworld_pretrain", f"--data.images={text}"], "train", "")
    assert given.recipe.data.images == text
