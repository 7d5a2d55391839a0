"""What is exported for haotian-liu's LLaVA has its names and fields, and comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dianjing.errors import ExportError
from dianjing.export import llava
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.export.merge import merged_state
from dianjing.importing.run import ImportOptions, import_run
from dianjing.infer.load import load_for_use
from dianjing.model.weights import trainable_state
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model
from tests.xtuner import XTUNER

LORA = {"tuning": "lora"}
INTERNLM2 = {"folder": str(XTUNER / "tiny" / "tiny_internlm2")}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_a_projector_alone_is_what_llavas_pretraining_writes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("pretrain")
    loaded, out = loaded_model(recipe), tmp_path / "llava-x"
    export(loaded, out, (), "llava")
    projector = loaded.model.model.multi_modal_projector.state_dict()
    written = torch.load(out / "mm_projector.bin", weights_only=True)
    assert written.keys() == {f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert torch.equal(written["model.mm_projector.2.weight"], projector["linear_2.weight"])
    config = config_of(out)
    assert config["mm_vision_tower"] == recipe.vision_tower.folder
    assert (config["mm_projector_type"], config["mm_vision_select_layer"], config["mm_hidden_size"]) == (
        "mlp2x_gelu",
        -2,
        24,
    )
    assert not config["mm_use_im_start_end"]

    import_run(out, tmp_path / "run", ImportOptions(llm=recipe.language_model.folder))
    again = trainable_state(load_for_use(str(tmp_path / "run"), "cpu").model)
    assert all(torch.equal(again[name], weight) for name, weight in trainable_state(loaded.model).items())


@pytest.mark.parametrize(
    "sections",
    [
        {"language_model": LORA},
        {"language_model": LORA, "vision_tower": LORA},
        {"language_model": {**LORA, **INTERNLM2, "lora_share_qkv": True, "lora_head": True}},
        {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}},
    ],
)
def test_other_runs_are_a_whole_model_that_comes_back(
    sections: dict[str, Any], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe("finetune", **sections)
    loaded, out = loaded_model(recipe), tmp_path / "llava-x"
    proof = export(loaded, out, (), "llava")
    assert all(case.equal for case in proof.cases)
    written, merged = load_file(out / "model.safetensors"), merged_state(loaded.model)
    tower = "vision_tower" in sections
    assert config_of(out)["unfreeze_mm_vision_tower"] == tower
    assert any("vision_tower.vision_tower.vision_model." in name for name in written) == tower
    assert torch.equal(written["model.mm_projector.0.weight"], merged["model.multi_modal_projector.linear_1.weight"])

    # The LLM within is a plain Llama, whatever it was before.
    plain = {
        name: weight for name, weight in written.items() if "mm_projector" not in name and "vision_tower" not in name
    }
    llm = LlamaForCausalLM(loaded.model.config.text_config)
    llm.load_state_dict(plain)
    assert config_of(out)["architectures"] == ["LlavaLlamaForCausalLM"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()

    options = ImportOptions(llm=recipe.language_model.folder, template="internlm2_chat")
    import_run(out, tmp_path / "run", options)
    again = trainable_state(load_for_use(str(tmp_path / "run"), "cpu").model)
    assert all(torch.equal(weight, merged[name]) for name, weight in again.items())


def test_fewer_bits_are_measured(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    loaded = loaded_model(make_recipe("finetune", language_model=LORA))
    proof = export(loaded, tmp_path / "llava-x", (), "llava", Options(dtype="fp16"))
    assert load_file(tmp_path / "llava-x" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    assert 0 < (proof.max_rounding_difference or 0) < 0.1
    assert proof.max_logit_difference < 1e-4
    assert "rounding moves the logits by up to" in proof.notes[0]


def test_a_weight_that_changed_on_the_way_is_seen(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_model(make_recipe("finetune", language_model=LORA))
    names = llava.llava_name
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def wrong(live: str) -> str:
        kind = live.split(".")[-2]
        return names(live.replace(kind, swapped.get(kind, kind)))

    monkeypatch.setattr(llava, "llava_name", wrong)
    with pytest.raises(ExportError, match="was read back as something else"):
        export(loaded, tmp_path / "llava-x", (), "llava")
    assert not (tmp_path / "llava-x").exists()


def test_an_llm_that_llava_has_no_class_for_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    loaded = loaded_model(make_recipe("pretrain"))
    loaded.model.config.text_config.model_type = "qwen2"
    with pytest.raises(ExportError, match='holds Llama and Mistral, not "qwen2"'):
        export(loaded, tmp_path / "out", (), "llava")
