"""Live names and configuration -> the layout of LLaVA on the hub, which transformers 4.x and 5.x both read.

transformers 5 saves a LLaVA that was put together from parts under names which 4.x does not know: 4.x then
starts with a random vision tower and only a warning. Hence the names are written by hand, and proved by the
receipt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlavaConfig, PreTrainedConfig

from dianjing.errors import ExportError
from dianjing.model.projector import KINDS
from dianjing.model.towers.families import tower_family
from dianjing.model.towers.tower import Tower
from dianjing.pictures.image import RULE_KEY, ImageProcessor
from dianjing.pictures.rule import PLAIN

VOCAB_MULTIPLE = 64
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
LIVE_EMBEDDING = "model.language_model.embed_tokens.weight"
LIVE_HEAD = "lm_head.weight"
_PREFIXES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def not_held(format: str, tower: Any, projector: str) -> str | None:
    """Return why a format has no place for a vision tower's configuration or a kind of projector; None if it has."""
    family = tower_family(tower)
    way_out = "the whole model (--format hf)"
    if format == "hf" or "hf" not in family.layouts(tower) & KINDS[projector].layouts:
        way_out = "what was learned (--format adapter)"
    if format not in family.layouts(tower):
        return f"{format} has no place for a {family.name} vision tower; export {way_out}"
    if format not in KINDS[projector].layouts:
        return f'{format} has no place for a projector of the kind "{projector}"; export {way_out}'
    return None


def hub_name(live: str, family: Tower) -> str:
    """Return the hub's name of a weight; the family knows what its tower's are.

        model.vision_tower.embeddings.class_embedding -> vision_tower.vision_model.embeddings.class_embedding

    Raises:
        ExportError: a weight that a LLaVA does not have.
    """
    for prefix, written in _PREFIXES:
        if live.startswith(prefix):
            own = live.removeprefix(prefix)
            return written + (family.hub_name(own) if written == "vision_tower." else own)
    raise ExportError(f"weight {live!r} is of no part of a LLaVA; the export would lose it")


def with_image_row(state: Mapping[str, Tensor], image_token_id: int, stand_in_id: int) -> dict[str, Tensor]:
    """Return live weights with a vocabulary that holds the image token.

    New rows repeat the row of `stand_in_id` (BOS), so that greedy decoding never chooses them: at equal logits
    the lower id wins. Tied weights stay one tensor.
    """
    tied = state[LIVE_HEAD] is state[LIVE_EMBEDDING]
    longer = {name: _longer(state[name], image_token_id, stand_in_id) for name in (LIVE_EMBEDDING, LIVE_HEAD)}
    if tied:
        longer[LIVE_HEAD] = longer[LIVE_EMBEDDING]
    return {**state, **longer}


def _longer(rows: Tensor, image_token_id: int, stand_in_id: int) -> Tensor:
    """Return rows up to a multiple of VOCAB_MULTIPLE where the image token has none."""
    if image_token_id < rows.shape[0]:
        return rows
    missing = -(-(image_token_id + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE - rows.shape[0]
    return torch.cat([rows, rows[stand_in_id].expand(missing, -1)])


def hub_state(state: Mapping[str, Tensor], dtype: torch.dtype, family: Tower) -> dict[str, Tensor]:
    """Return live weights under the hub's names; the head is left out where it is the embedding itself (tied).

    Raises:
        ExportError: a weight is too large for `dtype`.
    """
    tied = state[LIVE_HEAD] is state[LIVE_EMBEDDING]
    written: dict[str, Tensor] = {}
    for name, weight in state.items():
        if tied and name == LIVE_HEAD:
            continue
        rounded = weight.to(dtype).contiguous()
        if not rounded.isfinite().all():
            raise ExportError(f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold; take bf16")
        written[hub_name(name, family)] = rounded
    return written


def hub_config(
    config: LlavaConfig, *, vocab_size: int, tied: bool, image_token_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Return config.json; both spellings where the two generations of readers differ."""
    text_config, vision_config = cast(Any, config.text_config), cast(Any, config.vision_config)
    kind = str(dtype).removeprefix("torch.")
    text = part_config(text_config, kind) | {"vocab_size": vocab_size, "tie_word_embeddings": tied}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": kind,
        "image_token_index": image_token_id,
        "image_token_id": image_token_id,
        "image_seq_length": config.image_seq_length,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": part_config(vision_config, kind),
    }


def part_config(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """Return the LLM's or the tower's configuration as 4.x writes it: rope_theta, rope_scaling, torch_dtype."""
    values = config.to_dict()
    for name in ("dtype", "transformers_version", "_name_or_path", "architectures", "quantization_config"):
        values.pop(name, None)
    rope = values.pop("rope_parameters", None)
    if rope and "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    elif rope:
        # Gemma 3: one set for its layers with a window, one for those without.
        full, sliding = rope["full_attention"], rope["sliding_attention"]
        values["rope_theta"], values["rope_local_base_freq"] = full.pop("rope_theta"), sliding["rope_theta"]
        values["rope_scaling"] = None if full.get("rope_type", "default") == "default" else full
    return values | {"torch_dtype": dtype}


def preprocessor_config(processor: ImageProcessor) -> dict[str, Any]:
    """Return preprocessor_config.json of the stock image processor that does what training did.

    LLaVA's pads to a square on the mean colour, whatever the tower; CLIP's and SigLIP's own do not. Of a square
    the shorter side is both sides; readers that know no height and width take it (openvino-genai).
    """
    size, square = processor.size, {"height": processor.size, "width": processor.size}
    by_side = processor.crop or processor.aspect == "pad"
    stock = "CLIPImageProcessor" if processor.crop else "SiglipImageProcessor"
    return {
        "image_processor_type": "LlavaImageProcessor" if processor.aspect == "pad" else stock,
        "processor_class": "LlavaProcessor",
        "do_pad": processor.aspect == "pad",
        "do_resize": True,
        "size": {"shortest_edge": processor.edge or size} if by_side else square,
        "resample": processor.resample,
        "do_center_crop": processor.crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": processor.rescale,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "do_convert_rgb": True,
        **({} if processor.rule == PLAIN else {RULE_KEY: asdict(processor.rule)}),
    }
