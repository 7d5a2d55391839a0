"""Live names and configuration -> the layout of LLaVA on the hub, which transformers 4.x and 5.x both read.

transformers 5 saves a LLaVA that was put together from parts under names which 4.x does not know: 4.x then
starts with a random vision tower and only a warning. Hence the names are written by hand, and proved by the
receipt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlavaConfig, PreTrainedConfig

from dianjing.errors import ExportError
from dianjing.model.vision import num_image_tokens

VOCAB_MULTIPLE = 64
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def hub_name(live: str) -> str:
    """Return the hub's name of a weight.

        model.vision_tower.embeddings.class_embedding -> vision_tower.vision_model.embeddings.class_embedding

    Raises:
        ExportError: a weight that a LLaVA does not have.
    """
    for prefix, written in _PREFIXES:
        if live.startswith(prefix):
            return written + live.removeprefix(prefix)
    raise ExportError(f"weight {live!r} is of no part of a LLaVA; the export would lose it")


def hub_state(state: Mapping[str, Tensor], image_token_id: int, stand_in_id: int) -> dict[str, Tensor]:
    """Return the weights under the hub's names, with a vocabulary that holds the image token.

    New rows repeat the row of `stand_in_id` (BOS), so that greedy decoding never chooses them: at equal logits
    the lower id wins. The head is left out where it is the embedding itself (tied).
    """
    renamed = {hub_name(name): tensor for name, tensor in state.items()}
    tied = renamed[HEAD] is renamed[EMBEDDING]
    for name in (EMBEDDING, HEAD):
        rows = renamed[name].shape[0]
        if image_token_id >= rows:
            missing = -(-(image_token_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE - rows
            stand_in = renamed[name][stand_in_id].expand(missing, -1)
            renamed[name] = torch.cat([renamed[name], stand_in])
    if tied:
        del renamed[HEAD]
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def hub_config(config: LlavaConfig, *, vocab_size: int, tied: bool, image_token_id: int) -> dict[str, Any]:
    """Return config.json; both spellings where the two generations of readers differ."""
    text_config, vision_config = cast(Any, config.text_config), cast(Any, config.vision_config)
    text = _part_config(text_config) | {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "float32",
        "image_token_index": image_token_id,
        "image_token_id": image_token_id,
        "image_seq_length": num_image_tokens(vision_config, config.vision_feature_select_strategy),
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": _part_config(vision_config),
    }


def _part_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a part's configuration as 4.x writes it: rope_theta and rope_scaling apart, torch_dtype."""
    values = config.to_dict()
    for name in ("dtype", "transformers_version", "_name_or_path", "architectures"):
        values.pop(name, None)
    rope = values.pop("rope_parameters", None)
    if rope:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return values | {"torch_dtype": "float32"}
