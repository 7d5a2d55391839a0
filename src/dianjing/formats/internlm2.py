"""InternLM2's weights under Llama's names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dianjing.errors import ModelError

INTERNLM2_TO_LLAMA = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
FUSED_QKV = ".attention.wqkv."


class HeadsError(ModelError):
    """A wqkv is of an LLM with other heads."""


def internlm2_to_llama(name: str, weight: Tensor, config: Any) -> dict[str, Tensor]:
    """Return one InternLM2 tensor under Llama's names.

    wqkv holds, for each key-value head, the rows of its query heads, then of the key, then of the value:
    with 4 query and 2 key-value heads q0 q1 k0 v0 q2 q3 k1 v1.

    Raises:
        HeadsError: it cannot be divided so.
    """
    stored = name
    for old, new in INTERNLM2_TO_LLAMA.items():
        name = name.replace(old, new)
    if FUSED_QKV not in name:
        return {name: weight}
    heads = getattr(config, "num_attention_heads", 0)
    groups = getattr(config, "num_key_value_heads", None) or heads
    rows = weight.shape[0] if weight.dim() else 0
    if not rows or not groups or heads % groups or rows % (heads + 2 * groups):
        raise HeadsError(
            f"{stored} has {rows} rows, which {heads} query and {groups} key-value heads cannot share; it is of "
            "another LLM; name the one that it was trained on"
        )
    grouped = weight.unflatten(0, (groups, heads // groups + 2, -1))
    parts = {"q_proj": grouped[:, :-2], "k_proj": grouped[:, -2:-1], "v_proj": grouped[:, -1:]}
    return {
        name.replace(FUSED_QKV, f".self_attn.{part}."): rows.flatten(0, 2).contiguous() for part, rows in parts.items()
    }
