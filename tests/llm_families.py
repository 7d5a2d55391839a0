"""Tiny random LLMs of each family that is supported, as their folders look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import write_llm, write_tokenizer

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_scaling": LLAMA3_ROPE, "rope_theta": 500_000.0},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True},
    "smollm3": {"model_type": "smollm3"},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "phi3": {"model_type": "phi3"},
    # Its embeddings are multiplied by the root of their width: smaller weights, or rounding grows to no end.
    "gemma": {"model_type": "gemma", "head_dim": 8, "tie_word_embeddings": True, "initializer_range": 0.05},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 7, "layer_types": None},
    "internlm3": {"model_type": "internlm3"},
}


def write_family(folder: Path, family: str, **changed: Any) -> Path:
    """Save a random LLM of a family and a tokenizer; InternLM2 has no settings that can be changed."""
    if family.startswith("internlm2"):
        return write_internlm2(folder, dynamic=family == "internlm2.5")
    tokenizer = write_tokenizer(folder)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **FAMILIES[family],
        **changed,
    }
    if family == "gemma3":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for name, weight in model.named_parameters():
        if "norm" in name:  # else all ones or zeros, which no wrong place would show
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
    model.save_pretrained(folder)
    return folder


def write_internlm2(folder: Path, *, dynamic: bool) -> Path:
    """Save a random Llama as InternLM2 is shipped: fused wqkv, remote code, weights in two .bin shards."""
    write_llm(folder, rope_theta=1_000_000.0, initializer_range=0.1)
    weights = to_internlm2(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in shards.items():
        torch.save({name: weights[name].clone() for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    shipped = {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "attn_implementation": "eager",
        "bias": False,
        "model_type": "internlm2",
        "rope_theta": 1_000_000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0} if dynamic else None,
    }
    (folder / "config.json").write_text(json.dumps(config | shipped))
    (folder / "modeling_internlm2.py").write_text("raise SystemExit('code of a model folder was run')")
    return folder


def to_internlm2(llama: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the tiny Llama (4 query heads, 2 key-value heads of 8 rows) under InternLM2's names."""
    renames = {
        "model.embed_tokens.": "model.tok_embeddings.",
        "lm_head.": "output.",
        ".input_layernorm.": ".attention_norm.",
        ".post_attention_layernorm.": ".ffn_norm.",
        ".self_attn.o_proj.": ".attention.wo.",
        ".mlp.gate_proj.": ".feed_forward.w1.",
        ".mlp.up_proj.": ".feed_forward.w3.",
        ".mlp.down_proj.": ".feed_forward.w2.",
    }
    weights: dict[str, Tensor] = {}
    for name, weight in llama.items():
        if ".q_proj." in name:
            keys, values = (llama[name.replace("q_proj", f"{part}_proj")].view(2, 1, 8, 32) for part in "kv")
            fused = torch.cat([weight.view(2, 2, 8, 32), keys, values], 1)
            weights[name.replace("self_attn.q_proj", "attention.wqkv")] = fused.reshape(64, 32)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for old, new in renames.items():
                name = name.replace(old, new)
            weights[name] = weight
    return weights
