from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dianjing.config.fields import recipe_fields
from dianjing.config.steps import total_steps
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.errors import CheckpointError
from dianjing.model.build import build
from dianjing.run.state import FREE_TO_CHANGE, TrainState, require_same_run, state_at


@pytest.fixture
def recipe(make_recipe: Any) -> Any:
    return make_recipe(train={"global_batch_size": 3, "epochs": 2})


@pytest.fixture
def dataset(recipe: Any) -> Dataset:
    built = build(recipe)
    return open_dataset(recipe.data, built.encoder, built.image_processor)


def test_where_a_run_is_follows_from_its_step(recipe: Any, dataset: Dataset) -> None:
    assert dataset.num_records == 8
    places = [(state.epoch, state.samples_seen) for state in (state_at(k, recipe, dataset) for k in range(7))]
    assert places == [(0, 0), (0, 3), (0, 6), (1, 8), (1, 11), (1, 14), (2, 16)]


@pytest.mark.parametrize(("max_steps", "expected"), [(0, 6), (4, 4), (99, 6)])
def test_a_run_ends_with_its_epochs_or_earlier(recipe: Any, max_steps: int, expected: int) -> None:
    assert total_steps(replace(recipe, train=replace(recipe.train, max_steps=max_steps)), 8) == expected


def test_the_state_goes_through_json(recipe: Any, dataset: Dataset) -> None:
    state = state_at(5, recipe, dataset)
    assert TrainState.from_json(state.to_json()) == state
    require_same_run(TrainState.from_json(state.to_json()), state_at(0, recipe, dataset), "here")


def test_a_checkpoint_from_before_a_field_was_renamed_is_of_the_same_run(recipe: Any, dataset: Dataset) -> None:
    state = state_at(5, recipe, dataset)
    before = state.to_json().replace("language_model.quantization", "language_model.frozen")
    assert before != state.to_json()
    assert TrainState.from_json(before) == state


def test_the_fields_that_are_free_exist() -> None:
    assert recipe_fields().keys() > FREE_TO_CHANGE


def test_another_recipe_is_refused_and_its_changes_named(recipe: Any, dataset: Dataset) -> None:
    other = replace(recipe, seed=5, train=replace(recipe.train, learning_rate=0.5, save_every=1, keep=9))
    with pytest.raises(CheckpointError) as error:
        require_same_run(state_at(1, recipe, dataset), state_at(0, other, dataset), "runs/x/step-1")
    assert str(error.value).splitlines() == [
        "runs/x/step-1: it is of another run; undo this, or start a new run:",
        "  seed was 0, is 5",
        "  train.learning_rate was 0.001, is 0.5",
    ]


def test_a_field_that_the_saved_run_did_not_know_had_its_default(recipe: Any, dataset: Dataset) -> None:
    saved = state_at(1, recipe, dataset)
    del saved.recipe["data.transparency"]
    require_same_run(saved, state_at(0, recipe, dataset), "here")
    other = replace(recipe, data=replace(recipe.data, transparency="drop"))
    with pytest.raises(CheckpointError, match=r'data\.transparency was "white", is "drop"'):
        require_same_run(saved, state_at(0, other, dataset), "here")


def test_other_data_are_refused_and_what_changed_is_named(recipe: Any, dataset: Dataset) -> None:
    before = state_at(1, recipe, dataset)
    fewer = replace(dataset, report={**dataset.report, "records": 7}, fingerprint="x")
    with pytest.raises(CheckpointError, match="the data: records was 8, is 7"):
        require_same_run(before, state_at(0, recipe, fewer), "here")
    with pytest.raises(CheckpointError, match="the data: texts, answers, pictures or their order"):
        require_same_run(before, state_at(0, recipe, replace(dataset, fingerprint="x")), "here")
