"""The LLM families whose decoder layers are fused: a row says how a family's layer differs from Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from dianjing.layers.fused.linear import can_fuse

GATES = {"silu": silu}
"""Activations of gated MLPs that ops.py computes."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's decoder layer is built: attributes are those of transformers' modules."""

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """Of the layer: RMSNorm before attention, and before the MLP."""
    qk_norms: tuple[str, str] | None = None
    """Of the attention: RMSNorm of each head of queries, and of keys, before RoPE."""
    activation: str = "silu"
    """Of the MLP's gate; one of GATES."""
    window: Callable[[Any], int | None] = lambda _attention: None
    """Attention -> how far back a token sees, itself included; None: everything. A Llama's config may name a window
    (made of a Mistral's, say), which transformers does not apply."""


FAMILIES: dict[type, Family] = {
    LlamaDecoderLayer: Family(),
    MistralDecoderLayer: Family(window=attrgetter("config.sliding_window")),
    Qwen2DecoderLayer: Family(window=attrgetter("sliding_window")),
    Qwen3DecoderLayer: Family(window=attrgetter("sliding_window"), qk_norms=("q_norm", "k_norm")),
}
"""By the exact class of a layer. Biases need no row: linear layers bring them along."""


def family_of(layer: Any) -> Family | None:
    """Return the row of a layer's family; None if layers of its kind are not fused, or if this one cannot be.

    It cannot if anything but adapters trains, if the linear layers of a group are held differently, or if its config
    asks for another activation or for dropout of attention.
    """
    family = FAMILIES.get(type(layer))
    if family is None:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    points = torch.linspace(-3, 3, 5)
    plain = getattr(attention, "attention_dropout", 0.0) == 0 and torch.equal(
        mlp.act_fn(points), GATES[family.activation](points)
    )
    norms = [getattr(layer, name) for name in family.norms]
    norms += [getattr(attention, name) for name in family.qk_norms or ()]
    fits = plain and all(map(can_fuse, linear_groups(layer))) and are_frozen(*norms)
    return family if fits else None


def linear_groups(layer: Any) -> list[list[Any]]:
    """Return the linear layers of a decoder layer, those with the same input together: qkv, o, gate and up, down."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def are_frozen(*modules: torch.nn.Module) -> bool:
    """Return whether no weight of the modules trains."""
    return not any(weight.requires_grad for module in modules for weight in module.parameters())
