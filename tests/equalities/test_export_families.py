"""Runs on LLMs of other families, in four bits, and of InternLM2's own layout: their exports answer as they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dianjing.errors import ExportError
from dianjing.export import hf
from dianjing.export.export import export
from dianjing.export.formats import Dtype, Options
from dianjing.export.layout import EMBEDDING, HEAD
from dianjing.infer.load import load_for_use
from dianjing.train.loop import train
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model
from tests.recipe_models import write_family, write_siglip
from tests.tiny import write_llm
from tests.xtuner import XTUNER

TINY = XTUNER / "tiny"
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm2": {},
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {},
    "phi3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 512},
}
LORA = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_exported(make_recipe: MakeRecipe, tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / "llm", family, **FAMILIES[family])
    template = "llama3_chat" if family == "llama" else "internlm2_chat"
    language_model = {"folder": str(folder), "template": template, "tuning": "lora"}
    sections = {"language_model": language_model, "vision_tower": {"tuning": "lora"}}
    loaded = loaded_model(make_recipe("finetune", **sections))
    proof = export(loaded, tmp_path / "out")
    assert all(case.equal for case in proof.cases)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert (HEAD in weights) != loaded.model.config.text_config.tie_word_embeddings
    rows = weights.get(HEAD, weights[EMBEDDING])
    first = len(loaded.tokenizer)
    assert torch.equal(rows[first:], rows[1].expand(len(rows) - first, -1))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_fewer_bits_are_the_same_weights_rounded(make_recipe: MakeRecipe, tmp_path: Path, dtype: Dtype) -> None:
    """And the receipt tells what the rounding costs, which is not nothing."""
    loaded = loaded_model(make_recipe("finetune", **LORA))
    proof = export(loaded, tmp_path / "out", options=Options(dtype=dtype))
    export(loaded, tmp_path / "fp32")
    rounded, full = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "fp32"))
    assert all(torch.equal(rounded[name], full[name].to(hf.DTYPES[dtype])) for name in full)
    assert proof.max_logit_difference < 1e-4
    assert proof.max_rounding_difference is not None
    assert proof.max_rounding_difference > 10 * proof.max_logit_difference
    receipt = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert receipt["max_rounding_difference"] == proof.max_rounding_difference
    assert f"rounding to {dtype} moves the logits" in receipt["notes"][1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == str(rounded[EMBEDDING].dtype)[6:]


def test_what_fp16_cannot_hold_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    loaded = loaded_model(make_recipe("finetune", **LORA))
    with torch.no_grad():
        loaded.model.get_parameter("model.language_model.embed_tokens.weight")[5, 5] = 1e5
    with pytest.raises(ExportError, match=r"embed_tokens.*float16 cannot hold; take bf16"):
        export(loaded, tmp_path / "out", options=Options(dtype="fp16"))


@pytest.mark.parametrize("format", ["hf", "adapter"])
def test_four_bits_are_undone(make_recipe: MakeRecipe, tmp_path: Path, format: str) -> None:
    pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")
    folder = write_llm(tmp_path / "llm", hidden_size=64, intermediate_size=64)
    recipe = make_recipe("finetune", language_model={"folder": str(folder), "tuning": "lora", "quantization": "nf4"})
    proof = export(loaded_model(recipe), tmp_path / "out", format=format)
    assert proof.max_logit_difference < 1e-4
    if format == "adapter":
        cost = proof.max_rounding_difference
        assert cost is not None
        assert cost > 0.01
        assert f"{cost:.1e}" in proof.notes[0]


def test_internlm2s_own_layout(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Trained by the product itself, from a folder with a fused wqkv."""
    recipe = make_recipe(
        "finetune",
        language_model={"folder": str(TINY / "tiny_internlm2"), "tuning": "lora", "lora_share_qkv": True},
        vision_tower={"folder": str(TINY / "tiny_clip"), "tuning": "lora"},
    )
    run = train(recipe, quiet=True)
    proof = export(load_for_use(str(run), "cpu"), tmp_path / "out", conversations()[:3])
    assert proof.max_logit_difference < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["model_type"] == "llama"
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("tiny_internlm2", "tiny_clip", "8 records", "| steps | 2 of 4 records", "LoRA (rank 4, alpha 128)"):
        assert fact in card


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_siglip_is_read_by_a_stock_image_processor(make_recipe: MakeRecipe, tmp_path: Path, aspect: str) -> None:
    tower = {"folder": str(write_siglip(tmp_path / "tower")), "tuning": "lora"}
    sections = {"language_model": {"tuning": "lora"}, "vision_tower": tower, "data": {"aspect": aspect}}
    proof = export(loaded_model(make_recipe("finetune", **sections)), tmp_path / "out", conversations()[:2])
    assert all(case.pixel_difference == 0 for case in proof.cases)
    assert proof.max_logit_difference < 1e-4
    preprocessing = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    stock = {"pad": "LlavaImageProcessor", "crop": "SiglipImageProcessor"}
    assert preprocessing["image_processor_type"] == stock[aspect]
