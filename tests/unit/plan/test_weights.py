"""The weights of a plan are those of the model that is really built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dianjing.config.schema import Recipe
from dianjing.errors import ModelError
from dianjing.model.build import build
from dianjing.model.stage import apply_stage
from dianjing.plan.weights import Weights, weights_of, weights_of_recipe
from tests.conftest import MakeRecipe
from tests.llm_families import FAMILIES, write_family

ADAPTERS = {"tuning": "lora", "lora_rank": 4}


def built(recipe: Recipe) -> Weights:
    model = build(recipe).model
    apply_stage(model, recipe)
    return weights_of(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ["internlm2", "llama2", "smollm", "qwen3", "phi3", "gemma"]
    return {name: write_family(tmp_path_factory.mktemp(name.replace(".", "_")), name) for name in names}


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
@pytest.mark.parametrize("family", ["internlm2", "llama2", "smollm", "qwen3", "phi3", "gemma"])
def test_as_many_parameters_as_the_built_model(
    make_recipe: MakeRecipe, folders: dict[str, Path], family: str, tuning: str
) -> None:
    assert family == "internlm2" or family in FAMILIES
    stage = "pretrain" if tuning == "frozen" else "finetune"
    llm = {**ADAPTERS, "folder": str(folders[family]), "tuning": tuning, "template": ""}
    recipe = make_recipe(stage, language_model=llm, vision_tower={"tuning": tuning})
    assert weights_of_recipe(recipe) == built(recipe)


def test_siglip_and_other_adapters(make_recipe: MakeRecipe, tiny_siglip: Path) -> None:
    llm = {**ADAPTERS, "lora_head": True, "lora_share_qkv": True}
    tower = {**ADAPTERS, "folder": str(tiny_siglip), "feature_layer": -1}
    recipe = make_recipe("finetune", language_model=llm, vision_tower=tower)
    assert weights_of_recipe(recipe) == built(recipe)


def test_four_bit_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'dianjing[qlora]'")
    from tests.recipe_models import write_family as write_larger

    llm = {**ADAPTERS, "folder": str(write_larger(tmp_path / "llm", "llama")), "quantization": "nf4", "template": ""}
    recipe = make_recipe("finetune", language_model=llm)
    assert weights_of_recipe(recipe) == built(recipe)


def test_eight_bit_weights(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dianjing.model.build.require_fp8", lambda *_: None)
    monkeypatch.setattr("dianjing.model.build.prove_isolation", lambda _: None)
    recipe = make_recipe("finetune", language_model={**ADAPTERS, "quantization": "fp8"}, train={"precision": "bf16"})
    assert weights_of_recipe(recipe) == built(recipe)


def test_no_weights_are_read(make_recipe: MakeRecipe, tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    folders: dict[str, Any] = {}
    for part, source in (("language_model", tiny_llm), ("vision_tower", tiny_clip)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes((source / "config.json").read_bytes())
        folders[part] = {"folder": str(tmp_path / part)}
    allocated = torch.empty(0).untyped_storage().nbytes()
    assert weights_of_recipe(make_recipe("pretrain", **folders)) == built(make_recipe("pretrain"))
    assert not allocated


def test_a_folder_that_is_no_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config\.json; give the folder of a Hugging Face model"):
        weights_of_recipe(make_recipe(language_model={"folder": str(tmp_path)}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ModelError, match=r"config\.json: .*copy it again"):
        weights_of_recipe(make_recipe(language_model={"folder": str(tmp_path)}))
    with pytest.raises(ModelError, match="no such language model folder"):
        weights_of_recipe(make_recipe(language_model={"folder": "/nowhere/llm"}))
