"""Random LLMs of the supported architectures, as small as the tiny Llama and with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import write_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mistral": {},
    "phi3": {"pad_token_id": 0},
    "gemma": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 512},
}
"""model_type (and a word more) -> the settings of its configuration that are not the same for all."""


def write_family(folder: Path, family: str, *, width: int = 32) -> Path:
    """Save an LLM of a family, two layers, and its tokenizer."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **FAMILIES[family],
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split()[0], **settings)).save_pretrained(folder)
    return folder


def write_internlm2(folder: Path, *, width: int = 32) -> Path:
    """Save an InternLM2 of two layers in its own layout: one wqkv for q, k and v, and its own names."""
    tokenizer = write_tokenizer(folder)
    size, inner, heads, groups = len(tokenizer), 2 * width, 4, 2
    torch.manual_seed(0)
    layer = {
        "attention.wqkv": ((heads + 2 * groups) * width // heads, width),
        "attention.wo": (width, width),
        "feed_forward.w1": (inner, width),
        "feed_forward.w3": (inner, width),
        "feed_forward.w2": (width, inner),
    }
    shapes = {"model.tok_embeddings": (size, width), "output": (size, width)} | {
        f"model.layers.{number}.{name}": shape for number in range(2) for name, shape in layer.items()
    }
    norms = [f"model.layers.{number}.{name}_norm" for number in range(2) for name in ("attention", "ffn")]
    weights = {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    weights |= {f"{name}.weight": 1 + torch.randn(width) * 0.1 for name in ("model.norm", *norms)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "internlm2",
        "vocab_size": size,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 512,
        "bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
