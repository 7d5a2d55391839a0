from __future__ import annotations

import json
from pathlib import Path

import pytest

from dianjing.errors import CheckpointError, ModelError
from dianjing.use.generate import generate_ids
from dianjing.use.load import load_for_use
from tests.conftest import MakeRecipe
from tests.seers import conversations, seer_of, text_seer, write_run

TOKENS = 12


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("pretrain", {}),
        ("finetune", {"language_model": {"tuning": "lora", "template": ""}, "vision_tower": {"tuning": "lora"}}),
        ("finetune", {"language_model": {"tuning": "full"}}),
    ],
)
def test_a_run_answers_as_it_was_left(make_recipe: MakeRecipe, stage: str, sections: dict) -> None:
    recipe = make_recipe(stage, projector={"init_from": "a/run/that/is/gone"}, **sections)
    trained = seer_of(make_recipe(stage, **sections))
    run = write_run(recipe, trained)
    seer = load_for_use(str(run), "cpu")
    assert seer.can_see
    assert seer.name == str(run)
    assert generate_ids(seer, conversations(), TOKENS) == generate_ids(trained, conversations(), TOKENS)


def test_a_text_llm_has_no_eyes(tiny_llm: Path) -> None:
    seer = load_for_use(str(tiny_llm), "cpu")
    assert not seer.can_see
    assert seer.encoder.template.name == "internlm2_chat"
    asked = conversations()
    assert generate_ids(seer, asked, TOKENS) == generate_ids(text_seer(tiny_llm), asked, TOKENS)


def test_what_is_no_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; give a run"):
        load_for_use(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"neither recipe\.toml"):
        load_for_use(str(tmp_path))
    other = {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match='its vision tower is "pixtral"'):
        load_for_use(str(tmp_path))
    layers = {"vision_config": {"model_type": "clip_vision_model"}, "vision_feature_layer": [-2, -5]}
    (tmp_path / "config.json").write_text(json.dumps(other | layers))
    with pytest.raises(ModelError, match="features of several layers"):
        load_for_use(str(tmp_path))


def test_a_run_without_a_whole_checkpoint_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("pretrain")
    run = write_run(recipe, seer_of(recipe))
    weights = next(run.glob("checkpoints/*/trainable.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        load_for_use(str(run))
