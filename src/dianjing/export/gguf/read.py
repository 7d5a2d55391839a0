"""The two files -> the model in them, read by other means than wrote them.

The text file is read by transformers, which has its own reader of GGUF; the mmproj file by a graph made from its
keys alone, step by step what llama.cpp's is (tools/mtmd/models/llava.cpp), with the class token first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dianjing.export.gguf.file import read_keys, read_tensors
from dianjing.export.gguf.text import ROPE_FACTORS, TEXT_FILE
from dianjing.export.gguf.vision import VISION_FILE


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A text file and its mmproj file, read."""

    text: PreTrainedModel
    vision_keys: Mapping[str, Any]
    vision_tensors: dict[str, Tensor]


def read_pair(folder: Path) -> Pair:
    """Return what the two files of a folder hold, in fp32."""
    keys = read_keys(folder / TEXT_FILE)
    config = AutoConfig.from_pretrained(folder, gguf_file=TEXT_FILE, local_files_only=True)
    # The one key that transformers does not read for every architecture.
    config.head_dim = keys[f"{keys['general.architecture']}.attention.key_length"]
    text: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=TEXT_FILE, config=config, dtype=torch.float32, local_files_only=True
    )
    for factors in read_tensors(folder / TEXT_FILE, ROPE_FACTORS).values():  # which transformers leaves unread
        text.model.rotary_emb.inv_freq /= factors
    vision = folder / VISION_FILE
    return Pair(text=text.eval(), vision_keys=read_keys(vision), vision_tensors=read_tensors(vision))


@torch.inference_mode()
def pair_logits(
    pair: Pair, input_ids: Sequence[int], image_token_id: int, pixel_values: Sequence[Float[Tensor, "3 size size"]]
) -> Float[Tensor, "tokens vocab"]:
    """Return the logits at every position, the features of the pictures standing at the image tokens."""
    ids = torch.tensor(input_ids)
    places = (ids == image_token_id).nonzero()[:, 0]
    embeddings = pair.text.get_input_embeddings()(ids.index_fill(0, places, 0))
    if pixel_values:
        features = clip_features(pair.vision_keys, pair.vision_tensors, torch.stack(list(pixel_values)))
        embeddings = embeddings.index_copy(0, places, features.flatten(0, 1))
    model: Any = pair.text
    return model(inputs_embeds=embeddings[None], use_cache=False).logits[0].float()


def clip_features(
    keys: Mapping[str, Any], tensors: Mapping[str, Tensor], pixel_values: Float[Tensor, "images 3 size size"]
) -> Float[Tensor, "images patches hidden"]:
    """Return what llama.cpp would put into the text model for pictures that are prepared already."""
    patches = F.conv2d(
        pixel_values, tensors["v.patch_embd.weight"], tensors.get("v.patch_embd.bias"), keys["clip.vision.patch_size"]
    )
    hidden = patches.flatten(2).transpose(1, 2)
    has_class = "v.class_embd" in tensors
    if has_class:
        first = tensors["v.class_embd"].expand(len(hidden), 1, -1)
        hidden = torch.cat([first, hidden], 1)
    hidden = hidden + tensors["v.position_embd.weight"][: hidden.shape[1]]
    if "v.pre_ln.weight" in tensors:
        hidden = _norm(keys, tensors, "v.pre_ln", hidden)
    for layer in range(max(keys["clip.vision.feature_layer"])):
        name = f"v.blk.{layer}"
        hidden = hidden + _attention(keys, tensors, name, _norm(keys, tensors, f"{name}.ln1", hidden))
        wide = _linear(tensors, f"{name}.ffn_up", _norm(keys, tensors, f"{name}.ln2", hidden))
        active = F.gelu(wide, approximate="tanh") if keys.get("clip.use_gelu") else wide * torch.sigmoid(1.702 * wide)
        hidden = hidden + _linear(tensors, f"{name}.ffn_down", active)
    hidden = hidden[:, 1:] if has_class else hidden
    return _linear(tensors, "mm.2", F.gelu(_linear(tensors, "mm.0", hidden), approximate="tanh"))


def _norm(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return F.layer_norm(hidden, weight.shape, weight, bias, keys["clip.vision.attention.layer_norm_epsilon"])


def _linear(tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return F.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def _attention(keys: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    heads = keys["clip.vision.attention.head_count"]
    query, key, value = (
        _linear(tensors, f"{name}.attn_{part}", hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return _linear(tensors, f"{name}.attn_out", mixed.transpose(1, 2).flatten(2))
