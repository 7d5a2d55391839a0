"""Text LLM -> the keys and tensors that llama.cpp reads it from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dianjing.errors import ExportError

if TYPE_CHECKING:
    from dianjing.export.gguf.file import Value  # needs the package gguf

TEXT_FILE = "text.gguf"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""model_type -> llama.cpp's name; InternLM2 is read as Llama before it comes here."""
PLAIN_ROPE = ("default", "dynamic")
"""dynamic: plain up to max_position_embeddings, which is what the file says the model reads."""
ROPE_FACTORS = "rope_freqs.weight"
"""Divisors of the frequencies of Llama 3's positions; llama.cpp reads it for "llama" only."""

_PREFIX = "model.language_model."
EMBEDDING, HEAD = f"{_PREFIX}embed_tokens.weight", "lm_head.weight"
_OUTER = {"embed_tokens": "token_embd", "norm": "output_norm"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OPTIONAL = {
    "llama": (),
    "qwen2": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "qwen3": ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
}
"""Weights that one architecture has beyond the others."""
_SPECIAL = {name for names in _OPTIONAL.values() for name in names}


def architecture(config: Any) -> str:
    """Return llama.cpp's name for an LLM.

    Raises:
        ExportError: there is none, or the LLM has what cannot be said in the file.
    """
    kind, rope = config.model_type, dict(config.rope_parameters or {})
    if kind not in ARCHITECTURES:
        raise ExportError(
            f'GGUF: an LLM of type "{kind}" cannot be written yet; there are {", ".join(ARCHITECTURES)} and internlm2'
        )
    if rope.get("rope_type", "default") not in (*PLAIN_ROPE, *(("llama3",) if kind == "llama" else ())):
        raise ExportError(
            f'GGUF: positions scaled as "{rope["rope_type"]}" cannot be written yet (plain, dynamic and llama3 can); '
            "export as hf and convert the text part with llama.cpp's own program"
        )
    if config.hidden_act != "silu":
        raise ExportError(f'GGUF: llama.cpp computes {kind} with silu, but this LLM has "{config.hidden_act}"')
    return ARCHITECTURES[kind]


def text_keys(config: Any) -> dict[str, Value]:
    """Return the keys of an LLM, its tokenizer's aside."""
    name = architecture(config)
    head_dim = head_size(config)
    return {
        "general.architecture": name,
        "general.type": "model",
        f"{name}.context_length": _context(config),
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": head_dim,
        f"{name}.attention.value_length": head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def head_size(config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _context(config: Any) -> int:
    """Return how many positions the model reads; llama.cpp knows no sliding window here, so it ends with one."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def text_tensors(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the LLM's tensors of a LLaVA's state dict, as llama.cpp names and orders them.

    Raises:
        ExportError: a weight that this architecture does not have there.
    """
    kind = architecture(config)
    tensors: dict[str, Tensor] = {}
    for live, tensor in text_state(state).items():
        name = text_name(live, kind)
        tensors[name] = _permuted(tensor, name, config) if kind == "llama" else tensor
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors[ROPE_FACTORS] = _rope_factors(config)
    return tensors


def text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LLM's part of a LLaVA's state dict; the head only where it is not the embedding itself."""
    text = {name: tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    return text if state[HEAD] is state[EMBEDDING] else text | {HEAD: state[HEAD]}


def text_name(live: str, kind: str) -> str:
    """Return llama.cpp's name of a weight.

        model.language_model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight

    Raises:
        ExportError: this architecture has no place for it.
    """
    if live == HEAD:
        return "output.weight"
    inner = live.removeprefix(_PREFIX)
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", inner)
    if found:
        layer, part, end = found.groups()
        special = f"{part}.{end}" in _SPECIAL or end == "bias"
        if part in _LAYER and (not special or f"{part}.{end}" in _OPTIONAL[kind]):
            return f"blk.{layer}.{_LAYER[part]}.{end}"
    elif inner.removesuffix(".weight") in _OUTER:
        return f"{_OUTER[inner.removesuffix('.weight')]}.weight"
    raise ExportError(f'GGUF: llama.cpp\'s "{kind}" has no place for the weight {live}, which would be lost')


def _permuted(tensor: Tensor, name: str, config: Any) -> Tensor:
    """Return q's and k's rows in llama.cpp's order: a head's pairs of rotated rows next to each other.

    Hugging Face rotates row i of a head with row i + half.
    """
    if not name.endswith((".attn_q.weight", ".attn_k.weight")):
        return tensor
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(config: Any) -> Tensor:
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_size(config), 2) / head_size(config)
    return config.rope_parameters["rope_theta"] ** -exponents / scaled
