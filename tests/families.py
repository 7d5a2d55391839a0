"""Random LLMs of the supported architectures, as small as the tiny Llama and with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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


def write_family(folder: Path, family: str) -> Path:
    """Save an LLM of a family, two layers, 32 wide, and its tokenizer."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
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
