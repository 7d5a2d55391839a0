"""What shipped recipes train and hold at the true shapes of the models they name; nothing is allocated for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.layers.nf4 import quantize_layers
from dianjing.model.build import assemble
from dianjing.model.stage import StageReport, apply_stage
from tests.house.source import PACKAGE

INTERNLM2 = LlamaConfig(
    vocab_size=92544,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=8,
)
VICUNA = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
QWEN3 = Qwen3Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
SIGLIP2 = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)
LLMS = {
    "models/internlm2-chat-1_8b": INTERNLM2,
    "models/vicuna-7b-v1.5": VICUNA,
    "models/Llama-3.2-1B-Instruct": LLAMA,
    "models/Qwen3-1.7B": QWEN3,
}
TOWERS = {
    "models/clip-vit-large-patch14-336": (CLIPVisionModel, CLIP),
    "models/siglip2-so400m-patch14-384": (SiglipVisionModel, SIGLIP2),
}
RECIPES = [
    path
    for path in sorted((PACKAGE / "recipes").glob("*.toml"))
    if load_recipe(str(path)).language_model.folder in LLMS
]


def staged(recipe: Recipe) -> tuple[Any, StageReport]:
    """Return the model of a recipe and its report, in bf16 as on a GPU, on a device that holds no numbers."""
    tower_class, tower = TOWERS[recipe.vision_tower.folder]
    meta = torch.device("meta")
    with meta:
        llm = AutoModelForCausalLM.from_config(LLMS[recipe.language_model.folder], dtype=torch.bfloat16)
        model = assemble(llm, tower_class(tower).bfloat16(), 0, recipe.vision_tower.feature_layer, recipe.seed)
    if recipe.language_model.quantization:
        functional = pytest.importorskip("bitsandbytes.functional", reason="pip install 'dianjing[qlora]'")
        # It makes its table of 8-bit values where it is first needed, and keeps it.
        functional.quantize_4bit(torch.zeros(1, 64), compress_statistics=True)
        quantize_layers(llm, meta)
    with meta:
        return model.to(meta), apply_stage(model.to(meta), recipe)


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_of_a_recipe_says_what_it_holds(path: Path) -> None:
    _, report = staged(load_recipe(str(path)))
    caption = report.__rich__().caption
    assert f"# Memory: {caption};\n" in path.read_text(encoding="utf-8")


def test_xtuners_numbers_of_trainable_parameters() -> None:
    """XTuner trains 551,747,584 in the LLM, 28,311,552 in the tower and 6,295,552 in the projector."""
    recipe = load_recipe("llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune")
    model, report = staged(recipe)
    llm, tower, projector = (row.trainable for row in report.parts)
    rank, hidden, ffn = 64, 1024, 4096
    dead_layer = rank * (4 * (hidden + hidden) + 2 * (hidden + ffn))
    assert (llm, projector) == (551_747_584, 6_295_552)
    assert tower == 28_311_552 - dead_layer
    assert dead_layer == 28_311_552 // 24
    # Split into q, k and v, each with a down projection of its own, XTuner's wqkv would be this much more.
    alone = replace(recipe, language_model=replace(recipe.language_model, lora_share_qkv=False))
    _, other = staged(alone)
    assert other.parts[0].trainable == llm + 24 * 2 * 512 * 2048
    attention = model.model.language_model.layers[0].self_attn
    down, ups = attention.q_proj.lora_A["default"].weight, ("q_proj", "k_proj", "v_proj")
    fused = down.numel() + sum(getattr(attention, name).lora_B["default"].weight.numel() for name in ups)
    assert fused == 512 * (2048 + 4096)
