"""Tiny random LLMs and towers in the layouts of the families that recipes name; rows are whole blocks of NF4."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dianjing.formats.internlm2 import INTERNLM2_TO_LLAMA
from tests.tiny import IMAGE_SIZE, PATCH_SIZE, write_tokenizer

CHATML = ("<|im_start|>", "<|im_end|>")
MARKS = {"llama": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "vicuna": ()}
"""The chat marks that the tokenizer of a family knows, when they are not ChatML's."""
SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "internlm2": {},
    "llama": {},
    "vicuna": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "gemma": {},
}
"""What each has beside SHAPES."""


def write_family(folder: Path, kind: str, **more: Any) -> Path:
    """Save a random LLM of a family, with a tokenizer that knows the family's chat marks."""
    tokenizer = _write_tokenizer(folder, MARKS.get(kind, CHATML))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {**SHAPES, **FAMILIES.get(kind, {}), **more, **ids, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if kind == "internlm2":
        _write_internlm2(folder, settings)
    else:
        config = AutoConfig.for_model("llama" if kind == "vicuna" else kind, **settings)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, marks: Sequence[str]) -> PreTrainedTokenizerFast:
    """Save the tiny tokenizer with other chat marks than ChatML's two, whose places mean nothing then."""
    tokenizer = write_tokenizer(folder)
    if marks != CHATML:
        for path in folder.glob("*.json"):
            text = path.read_text(encoding="utf-8")
            for mark in CHATML:
                text = text.replace(mark, f"[UNUSED_{CHATML.index(mark)}]")
            path.write_text(text, encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [*marks]})
        tokenizer.save_pretrained(folder)
    return tokenizer


def _write_internlm2(folder: Path, settings: dict[str, Any]) -> None:
    """Save a Llama under InternLM2's names, q, k and v in one tensor."""
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    weights: dict[str, Tensor] = {}
    for name, weight in llama.state_dict().items():
        if name.endswith("q_proj.weight"):
            parts = {part: llama.get_parameter(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")}
            heads = settings["num_key_value_heads"]
            groups = [part.detach().unflatten(0, (heads, -1, settings["head_dim"])) for part in parts.values()]
            layer = name.partition(".self_attn")[0]
            weights[f"{layer}.attention.wqkv.weight"] = torch.cat(groups, 1).flatten(0, 2).contiguous()
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for new, old in INTERNLM2_TO_LLAMA.items():
                name = name.replace(old, new)
            weights[name] = weight.clone()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "internlm2", "rope_theta": 1e6, "rms_norm_eps": 1e-5, "bias": False, **settings}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_siglip(folder: Path) -> Path:
    """Save a SigLIP vision tower of three layers with its pooling head, and its preprocessing."""
    torch.manual_seed(1)
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")
    return folder
