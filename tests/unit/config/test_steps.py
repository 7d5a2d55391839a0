"""Batch and epochs for any number of records, and the warning about too few steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dianjing.config.load import load_recipe
from dianjing.config.schema import Stage
from dianjing.config.steps import AIM, FEW, FULL_BATCH, few_steps, fitting, steps_per_epoch, total_steps

RECIPE = load_recipe("qwen3_1_7b_siglip2_pretrain")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("records", [1, 6, 101, 999, 5000, 20_000, 76_799, 76_800, 558_000])
def test_what_is_proposed_makes_enough_steps_and_not_many_epochs(records: int, stage: Stage) -> None:
    batch, epochs = fitting(records, stage)
    steps = epochs * steps_per_epoch(records, batch)
    assert batch <= FULL_BATCH[stage]
    assert steps >= AIM
    assert epochs == 1 or steps - steps // epochs < AIM, "one epoch less would do"
    assert epochs == 1 or batch == 4, "many epochs only where batches cannot be smaller"


def test_many_records_get_llavas_numbers() -> None:
    assert fitting(558_000, "pretrain") == (256, 1)
    assert fitting(665_000, "finetune") == (128, 1)


def test_the_recipe_of_the_readme_on_a_hundred_captions_is_warned_of() -> None:
    text = few_steps(RECIPE, 101)
    assert text.startswith("only 1 optimizer step: 101 records in batches of 256, 1 epoch. ")
    assert text.endswith("train.global_batch_size = 4 and train.epochs = 12 make 312")
    changed = replace(RECIPE, train=replace(RECIPE.train, global_batch_size=4, epochs=12))
    assert total_steps(changed, 101) == 312
    assert few_steps(changed, 101) == ""


@pytest.mark.parametrize(("records", "warned"), [(256 * (FEW - 1), True), (256 * (FEW - 1) + 1, False), (0, False)])
def test_where_the_warning_begins(records: int, warned: bool) -> None:
    assert bool(few_steps(RECIPE, records)) is warned


def test_a_run_that_is_meant_to_be_short_is_not_warned_of() -> None:
    assert few_steps(replace(RECIPE, train=replace(RECIPE.train, max_steps=2)), 101) == ""
