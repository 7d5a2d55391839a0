"""Vision tower and projector -> the keys and tensors of an mmproj file (llama.cpp's `clip`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from dianjing.errors import ExportError
from dianjing.pictures.image import ImageProcessor

if TYPE_CHECKING:
    from dianjing.export.gguf.file import Value  # needs the package gguf

VISION_FILE = "mmproj.gguf"
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""model_type -> the only choice of features that llama.cpp makes for it: without the class token, or all."""
GELU = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
"""hidden_act -> clip.use_gelu; without it llama.cpp computes quick_gelu."""
PAD_COLOUR = (122, 116, 104)
"""On which llama.cpp pads a picture to a square."""

_OUTER = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def check_tower(tower: Any) -> None:
    """Refuse a tower that llama.cpp would compute otherwise.

    Raises:
        ExportError: says why.
    """
    if tower.model_type not in TOWERS:
        known = ", ".join(TOWERS)
        raise ExportError(f'GGUF: a vision tower of type "{tower.model_type}" cannot be written; there are {known}')
    _refuse(
        {
            f"the activation {tower.hidden_act!r} of the vision tower": tower.hidden_act not in GELU,
            "an MLP as wide as the tower, whose two halves it would swap": tower.intermediate_size == tower.hidden_size,
        }
    )


def check_vision(config: Any, processor: ImageProcessor) -> None:
    """Refuse a tower, a projector or preprocessing that llama.cpp would compute otherwise.

    Raises:
        ExportError: says why.
    """
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    check_tower(tower)
    wrong = {
        f"vision_feature_select_strategy {strategy!r} (it uses {TOWERS[tower.model_type]!r})": strategy
        != TOWERS[tower.model_type],
        f"the activation {config.projector_hidden_act!r} of the projector": config.projector_hidden_act != "gelu",
        "a projector without biases": not config.multimodal_projector_bias,
        "features of several layers": not isinstance(config.vision_feature_layer, int),
        "another resampling than bicubic": processor.resample != Image.Resampling.BICUBIC,
    }
    _refuse(wrong)
    if not num_layers(config):
        raise ExportError("GGUF: llama.cpp cannot take the features before the tower's first layer; export as hf")


def _refuse(wrong: Mapping[str, bool]) -> None:
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ExportError(f"GGUF: llama.cpp cannot compute {what}; export as hf instead")


def num_layers(config: Any) -> int:
    """Return how many layers of the tower the features pass."""
    return range(config.vision_config.num_hidden_layers + 1)[config.vision_feature_layer]


def vision_keys(config: Any, processor: ImageProcessor) -> dict[str, Value]:
    """Return the keys of tower and projector."""
    tower, layers = config.vision_config, num_layers(config)
    keys: dict[str, Value] = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": tower.image_size,
        "clip.vision.patch_size": tower.patch_size,
        "clip.vision.embedding_length": tower.hidden_size,
        "clip.vision.feed_forward_length": tower.intermediate_size,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.block_count": layers,
        # Without it llama.cpp runs one layer less.
        "clip.vision.feature_layer": [layers],
        "clip.vision.attention.head_count": tower.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(tower.layer_norm_eps),
        "clip.vision.image_mean": list(processor.mean),
        "clip.vision.image_std": list(processor.std),
    }
    return keys | ({"clip.use_gelu": True} if GELU[tower.hidden_act] else {})


def vision_tensors(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return tower and projector of a LLaVA's state dict under llama.cpp's names.

    Layers that the features do not pass are left out, and what follows them.
    """
    tensors: dict[str, Tensor] = {}
    for live, tensor in state.items():
        if live.startswith("model.multi_modal_projector."):
            layer, end = live.removeprefix("model.multi_modal_projector.").split(".")
            tensors[f"{_PROJECTOR[layer]}.{end}"] = tensor
        elif live.startswith("model.vision_tower."):
            name = _name(live.removeprefix("model.vision_tower."), num_layers(config))
            if name:
                tensors[name] = tensor
    return tensors


def _name(live: str, layers: int) -> str:
    """encoder.layers.3.mlp.fc1.bias -> v.blk.3.ffn_up.bias; "" for what the features do not pass."""
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", live)
    if found and int(found[1]) < layers:
        return f"v.blk.{found[1]}.{_LAYER[found[2]]}.{found[3]}"
    if found or live.startswith(("post_layernorm.", "head.")):
        return ""
    return _OUTER[live]


def preprocessing_notes(config: Any, processor: ImageProcessor) -> list[str]:
    """Return how llama.cpp prepares a picture otherwise than training did."""
    notes = []
    colour = tuple(int(value * 255) for value in processor.mean)
    if processor.aspect != "pad":
        way = "cut to its middle" if processor.crop else "stretched to a square"
        notes.append(
            f"training saw a picture {way} (data.aspect = {processor.aspect!r}); llama.cpp pads it to a square: "
            "pictures that are not square look different to it"
        )
    elif colour != PAD_COLOUR:
        notes.append(
            f"training padded pictures to a square on {colour}; llama.cpp pads on {PAD_COLOUR}: the bars of pictures "
            "that are not square look different to it"
        )
    if config.vision_config.model_type == "clip_vision_model":
        notes.append(
            "llama.cpp versions with issue ggml-org/llama.cpp#25814 put CLIP's class token last and compute wrong "
            "features for every CLIP tower; use --verify to see whether yours does, or a SigLIP tower"
        )
    return notes
