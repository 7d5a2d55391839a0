"""What is exported for XTuner is what XTuner would have converted, and comes back tensor for tensor."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dianjing.errors import ExportError
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.export.merge import merged_state
from dianjing.formats.pickle import read_checkpoint
from dianjing.importing.run import ImportOptions, import_run
from dianjing.infer.load import load_for_use
from dianjing.model.weights import trainable_state
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model
from tests.xtuner import XTUNER

TINY = XTUNER / "tiny"
INTERNLM2 = {"folder": str(TINY / "tiny_internlm2"), "lora_share_qkv": True, "lora_head": True}
KINDS: dict[str, dict[str, Any]] = {
    "projector alone": {},
    "lora": {"language_model": {"tuning": "lora", "lora_alpha": 3.0}, "vision_tower": {"tuning": "lora"}},
    "lora on InternLM2": {"language_model": {"tuning": "lora", **INTERNLM2}, "vision_tower": {"tuning": "lora"}},
    "full": {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}},
    "full InternLM2, lora on the tower": {
        "language_model": {"tuning": "full", **INTERNLM2},
        "vision_tower": {"tuning": "lora"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_import_of_export_is_the_run_tensor_for_tensor(kind: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("finetune" if KINDS[kind] else "pretrain", **KINDS[kind])
    loaded = loaded_model(recipe)
    proof = export(loaded, tmp_path / "out", (), "xtuner")
    assert all(case.equal for case in proof.cases)
    options = ImportOptions(
        llm=recipe.language_model.folder, vision_tower=recipe.vision_tower.folder, template="internlm2_chat"
    )
    import_run(tmp_path / "out", tmp_path / "run", options)
    again = trainable_state(load_for_use(str(tmp_path / "run"), "cpu").model)
    before = trainable_state(loaded.model)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_a_real_checkpoint_is_converted_as_xtuner_converts_it(tmp_path: Path) -> None:
    source = TINY / "finetune_iter_10.pth"
    options = ImportOptions(llm=str(TINY / "tiny_internlm2"), vision_tower=str(TINY / "tiny_clip"))
    import_run(source, tmp_path / "run", options)
    out = tmp_path / "out"
    export(load_for_use(str(tmp_path / "run"), "cpu"), out, (), "xtuner")
    stored = read_checkpoint(source)["state_dict"]
    for part, file in (
        ("llm", "llm_adapter/adapter_model"),
        ("visual_encoder", "visual_encoder_adapter/adapter_model"),
        ("projector", "projector/model"),
    ):
        written = load_file(out / f"{file}.safetensors")
        expected = {
            name.removeprefix(f"{part}.").replace(".default", ""): weight
            for name, weight in stored.items()
            if name.startswith(f"{part}.")
        }
        assert written.keys() == expected.keys()
        for name, weight in expected.items():
            dead = part == "visual_encoder" and ".layers.2." in name
            assert torch.equal(written[name], torch.zeros_like(weight) if dead else weight), name
    config = json.loads((out / "llm_adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["task_type"], config["bias"]) == (4, 2, "CAUSAL_LM", "none")
    assert config["target_modules"] == ["output", "w1", "w2", "w3", "wo", "wqkv"]
    projector = json.loads((out / "projector" / "config.json").read_text(encoding="utf-8"))
    assert (projector["model_type"], projector["depth"], projector["visual_hidden_size"]) == ("projector", 2, 24)
    assert not list(out.rglob("*.py"))


def test_plain_peft_reads_the_adapters_as_xtuner_does(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("finetune", **KINDS["lora"])
    loaded = loaded_model(recipe)
    export(loaded, tmp_path / "out", (), "xtuner")
    merged = merged_state(loaded.model)
    base = AutoModelForCausalLM.from_pretrained(recipe.language_model.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about names that transformers will drop
        read: Any = PeftModel.from_pretrained(base, str(tmp_path / "out" / "llm_adapter")).merge_and_unload()
    for name, weight in read.state_dict().items():
        ours = merged[name if name.startswith("lm_head.") else f"model.language_model.{name.removeprefix('model.')}"]
        torch.testing.assert_close(weight, ours, rtol=0, atol=1e-6)


def test_what_xtuner_cannot_hold_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    apart = {"language_model": {"tuning": "lora", **INTERNLM2, "lora_share_qkv": False}}
    with pytest.raises(ExportError, match="lora_share_qkv = true"):
        export(loaded_model(make_recipe("finetune", **apart)), tmp_path / "out", (), "xtuner")
    loaded = loaded_model(make_recipe("pretrain"))
    with pytest.raises(ExportError, match="--dtype: the format xtuner does not take it"):
        export(loaded, tmp_path / "out", (), "xtuner", Options(dtype="fp16"))
    for name in ("recipe", "tower"):
        other = type(loaded)(**{**vars(loaded), "recipe": None}) if name == "recipe" else loaded
        if name == "tower":
            other.model.config.vision_config.model_type = "siglip_vision_model"
        for format in ("xtuner", "llava"):
            with pytest.raises(ExportError, match="is not a run" if name == "recipe" else "has no place for a SigLIP"):
                export(other, tmp_path / "out", (), format)
    assert not (tmp_path / "out").exists()
