"""The config.json of a Hugging Face model folder, read as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dianjing.errors import ModelError

MOST_LAYERS = 1000
"""A model is built before its weights are read: what a broken number would take hours for is refused."""
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rope_theta", "image_size", "patch_size"),
)
LATENT = ("deepseek_v2", "deepseek_v3")
"""Architectures whose attention has keys and values of its own for every head."""
ACTIVATIONS = ("hidden_act", "hidden_activation")
USUAL = ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh", "gelu_new", "relu")
"""Activations for which transformers need not be asked: with it comes torch, and a wrong folder is said before that."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        ModelError: it is missing, is not a JSON object, or has a size that no model can have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: there is no config.json; give the folder of a Hugging Face model")
    config = read_object(path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict) and (fault := impossible(part)):
            raise ModelError(f"{path}: {fault}{'' if 'write' in fault else '; copy it again'}")
    return config


def impossible(config: Mapping[str, Any]) -> str:
    """Return what is impossible in a config, "" if nothing; values of other types are left to transformers."""
    numbers = {name: config[name] for name in AT_LEAST_ONE if isinstance(config.get(name), int | float)}
    for name, value in numbers.items():
        if not value >= 1:
            return f"{name} is {value}; at least 1 is needed"
    if (layers := numbers.get("num_hidden_layers", 1)) > MOST_LAYERS:
        return f"num_hidden_layers is {layers}; no model has over {MOST_LAYERS}"
    heads, groups = numbers.get("num_attention_heads", 0), numbers.get("num_key_value_heads", 1)
    if heads % groups:
        return f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, {groups}"
    if heads != groups and groups > 1 and str(config.get("model_type")).startswith(LATENT):
        return f"num_key_value_heads is {groups}, where this architecture has as many as heads, {heads}"
    rows, padding = numbers.get("vocab_size"), config.get("pad_token_id")
    if rows and isinstance(padding, int) and padding >= rows:
        return f"pad_token_id is {padding}, beyond the {rows} tokens of the LLM; write null or a token that it has"
    for name in ACTIVATIONS:
        if isinstance(activation := config.get(name), str) and activation not in USUAL:
            from transformers.activations import ACT2FN

            if activation not in ACT2FN:
                return f'{name} is "{activation}", which transformers does not know'
    return ""


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        ModelError: it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, not a {type(content).__name__}")
    return content
