"""Faults that a run can have before its first step; each is planted, and a normal run says it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.errors import CheckpointError, ModelError, TrainError
from dianjing.run.checkpoint import newest, read_state
from dianjing.train.loop import train
from tests.tiny import write_clip

LORA = {"tuning": "lora", "lora_dropout": 0.1}


def test_a_run_in_which_nothing_would_change_is_refused(make_recipe: Any) -> None:
    with pytest.raises(TrainError, match=r"learning rate of all that trains is 0.*train\.learning_rate"):
        train(make_recipe(train={"learning_rate": 0.0}), quiet=True)
    with pytest.raises(TrainError, match="is 0, so nothing would change"):
        train(make_recipe(projector={"learning_rate": 0.0}), quiet=True)


def test_a_rate_that_no_weight_can_feel_stops_the_run(make_recipe: Any) -> None:
    with pytest.raises(TrainError, match=r"step 2: weights that train .*: projector at a rate of 1e-30"):
        train(make_recipe(train={"learning_rate": 1e-30}), quiet=True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"projector": {"learning_rate": 0.0}, "language_model": LORA}, "projector.learning_rate is 0: the projector"),
        ({"language_model": {"learning_rate": 0.0, **LORA}}, "language_model.learning_rate is 0: the language model"),
        ({"language_model": {"tuning": "frozen"}}, 'lora_rank: not used, since language_model.tuning is "frozen"'),
        ({"train": {"warmup_ratio": 1.0, "epochs": 4, "max_steps": 0}}, "the rate still rises at step 8 of 8"),
    ],
)
def test_a_part_that_would_not_change_is_said(
    make_recipe: Any, capsys: pytest.CaptureFixture[str], sections: Any, words: str
) -> None:
    train(make_recipe("finetune", **{**sections, "train": {"max_steps": 2, **sections.get("train", {})}}))
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_sound_run_has_no_doubts(make_recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe("finetune", language_model=LORA, vision_tower=LORA, train={"epochs": 4})
    train(recipe)
    said = capsys.readouterr().err
    assert not [word for word in ("is 0", "not used", "still rises") if word in said]


@pytest.fixture
def pretrained(make_recipe: Any, tmp_path: Path) -> Path:
    return train(replace(make_recipe(train={"max_steps": 1}), output=str(tmp_path / "pretrain")), quiet=True)


def finetune(make_recipe: Any, pretrained: Path, **sections: Any) -> Any:
    return make_recipe(
        "finetune", projector={"init_from": str(pretrained)}, train={"max_steps": 2, "save_every": 1}, **sections
    )


def test_a_projector_gets_the_features_it_was_trained_on(
    make_recipe: Any, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finetune(make_recipe, pretrained, vision_tower={"feature_layer": -1})
    with pytest.raises(ModelError, match=r"--allow-changed feature_layer:\n.*feature_layer was -2, is -1"):
        train(other, quiet=True)
    folder = write_clip(tmp_path / "other", seed=9)
    with pytest.raises(ModelError, match=r"--allow-changed vision_tower:\n  the weights or config.json"):
        train(finetune(make_recipe, pretrained, vision_tower={"folder": str(folder)}), quiet=True)
    run = train(other, allow_changed=["feature_layer"])
    assert "allowed: vision_tower.feature_layer was -2, is -1" in " ".join(capsys.readouterr().err.split())
    assert "feature_layer was -2, is -1" in read_state(newest(run)).allowed_changes[0]


def test_the_same_layer_counted_from_the_other_end_is_the_same(make_recipe: Any, pretrained: Path) -> None:
    train(finetune(make_recipe, pretrained, vision_tower={"feature_layer": 2}), quiet=True)


def test_a_changed_input_can_be_allowed_and_is_written_down(make_recipe: Any, tiny_clip: Path, tmp_path: Path) -> None:
    tower = shutil.copytree(tiny_clip, tmp_path / "tower")
    recipe = make_recipe(vision_tower={"folder": str(tower)}, train={"save_every": 1})
    run = train(recipe, quiet=True)
    shutil.rmtree(newest(run))
    write_clip(tower, seed=9)
    with pytest.raises(CheckpointError, match="--allow-changed vision_tower"):
        train(recipe, resume=True, quiet=True)
    with pytest.raises(CheckpointError, match="--allow-changed vision_tower"):
        train(recipe, resume=True, quiet=True, allow_changed=["pictures"])
    train(recipe, resume=True, quiet=True, allow_changed=["vision_tower"])
    state = read_state(newest(run))
    assert state.step == 2
    assert [change.partition(":")[0] for change in state.allowed_changes] == ["step 1"]
    train(recipe, resume=True, quiet=True)
