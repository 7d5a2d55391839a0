"""What was learned, exported alone: with the bases it is the run, for us and for plain peft."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dianjing.config.load import load_recipe, save_recipe
from dianjing.config.schema import Recipe
from dianjing.errors import ExportError, ModelError
from dianjing.export import adapter
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.export.merge import merged_state
from dianjing.infer.generate import LoadedModel, generate_ids
from dianjing.infer.load import load_for_use
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model, loaded_text_model
from tests.tiny import write_llm

LORA = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "the projector alone": ("pretrain", {}),
    "both parts": ("finetune", LORA),
    "the head too": ("finetune", {"language_model": {"tuning": "lora", "lora_head": True}}),
    "q, k and v share": ("finetune", {"language_model": {"tuning": "lora", "lora_share_qkv": True}}),
}


@pytest.mark.parametrize("run", list(RUNS))
def test_adapter_equals_run(make_recipe: MakeRecipe, tmp_path: Path, run: str) -> None:
    stage, sections = RUNS[run]
    loaded = loaded_model(make_recipe(stage, **sections))
    proof = export(loaded, tmp_path / "out", conversations(), "adapter")
    assert all(case.equal for case in proof.cases)
    assert (proof.max_logit_difference > 0) == (stage == "finetune"), "adapters apart against the sum"
    again = load_for_use(str(tmp_path / "out"), "cpu")
    assert generate_ids(again, conversations(), 12) == generate_ids(loaded, conversations(), 12)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {
        part for part, section in sections.items() if section["tuning"] == "lora"
    }


def test_plain_peft_has_the_merged_weights(make_recipe: MakeRecipe, tiny_llm: Path, tmp_path: Path) -> None:
    """With nothing of ours but the folder."""
    loaded = loaded_model(make_recipe("finetune", **LORA))
    export(loaded, tmp_path / "out", format="adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llm)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "language_model")
    merged = adapted.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    expected = merged_state(loaded.model)
    for name, weight in merged.items():
        live = name.replace("model.", "model.language_model.") if name.startswith("model.") else name
        torch.testing.assert_close(weight, expected[live])


def test_the_folder_names_no_other_place_of_this_machine(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("finetune", **LORA)
    export(loaded_model(recipe), tmp_path / "out", format="adapter")
    text = (tmp_path / "out" / "recipe.toml").read_text()
    assert recipe.data.images not in text
    assert recipe.output not in text
    assert load_recipe(tmp_path / "out" / "recipe.toml").data.path == ("data.json",)


def perturb(path: Path) -> None:
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name] = weights[name] * 1.05
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "file",
    ["projector.safetensors", "language_model/adapter_model.safetensors", "vision_tower/adapter_model.safetensors"],
)
def test_a_perturbed_adapter_is_not_kept(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    save = adapter.save

    def save_and_perturb(loaded: LoadedModel, folder: Path, options: Options) -> None:
        save(loaded, folder, options)
        perturb(folder / file)

    monkeypatch.setattr(adapter, "save", save_and_perturb)
    with pytest.raises(ExportError, match="not kept"):
        export(loaded_model(make_recipe("finetune", **LORA)), tmp_path / "out", format="adapter")
    assert not list(tmp_path.glob("out*"))


def test_wrong_settings_of_peft_are_not_kept(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which only plain peft reads."""
    save = adapter.save

    def save_and_edit(loaded: LoadedModel, folder: Path, options: Options) -> None:
        save(loaded, folder, options)
        path = folder / "language_model" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 64}))

    monkeypatch.setattr(adapter, "save", save_and_edit)
    with pytest.raises(ExportError, match=r"on \d+ of 10 conversations, so it is not kept"):
        export(loaded_model(make_recipe("finetune", **LORA)), tmp_path / "out", format="adapter")


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_a_full_run_has_nothing_small(make_recipe: MakeRecipe, tmp_path: Path, part: str) -> None:
    loaded = loaded_model(make_recipe("finetune", **{part: {"tuning": "full"}}))
    with pytest.raises(ExportError, match=f'{part}.tuning was "full".*nothing small to export'):
        export(loaded, tmp_path / "out", format="adapter")
    assert not list(tmp_path.glob("out*"))


def test_what_is_no_run_has_no_adapter(tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a run"):
        export(loaded_text_model(tiny_llm), tmp_path / "out", format="adapter")


def test_an_adapter_has_no_other_type(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--dtype: the format adapter does not take it"):
        export(loaded_model(make_recipe("pretrain")), tmp_path / "out", format="adapter", options=Options(dtype="bf16"))


@pytest.fixture
def moved(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    """Return the recipe of an adapter in `out`, whose LLM lies in `llm`."""
    recipe = make_recipe("finetune", language_model={"folder": str(write_llm(tmp_path / "llm")), "tuning": "lora"})
    export(loaded_model(recipe), tmp_path / "out", format="adapter")
    return load_recipe(tmp_path / "out" / "recipe.toml")


def test_a_base_that_moved_is_named(moved: Recipe, tmp_path: Path) -> None:
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=r"language model is not there any more.*language_model.folder in .*recipe.toml"
    ):
        load_for_use(str(tmp_path / "out"), "cpu")
    found = replace(moved.language_model, folder=str(tmp_path / "elsewhere"))
    save_recipe(replace(moved, language_model=found), tmp_path / "out" / "recipe.toml")
    assert load_for_use(str(tmp_path / "out"), "cpu").can_see


@pytest.mark.usefixtures("moved")
def test_another_base_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "llm")
    write_llm(tmp_path / "llm", seed=5)
    with pytest.raises(ModelError, match="not the language model that the adapter was trained on"):
        load_for_use(str(tmp_path / "out"), "cpu")


@pytest.mark.usefixtures("moved")
@pytest.mark.parametrize("fault", ["missing", "torn", "of another shape"])
def test_a_damaged_adapter_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "out" / "language_model" / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        del weights[name]
        save_file(weights | ({} if fault == "missing" else {name: torch.zeros(1, 1)}), path)
    with pytest.raises(ModelError, match=r"adapter cannot be read|are not those of recipe.toml"):
        load_for_use(str(tmp_path / "out"), "cpu")
