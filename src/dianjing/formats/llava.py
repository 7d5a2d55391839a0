"""Names of haotian-liu's LLaVA <-> XTuner's names, which all foreign tensors are given first.

model.mm_projector.0.weight                                        the projector, mlp2x_gelu: layers 0 and 2
base_model.model.model.mm_projector.0.weight                       the same, in non_lora_trainables.bin
base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     the LLM's adapter, in adapter_model.bin
model.vision_tower.vision_tower.vision_model.encoder...            the tower, where it was tuned
model.layers.0.self_attn.q_proj.weight                             the LLM
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dianjing.errors import ModelError

PEFT = "base_model.model."
PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower.vision_tower."
MLP = "mlp2x_gelu"
LIVE_NAMES = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": f"{PROJECTOR}0.",
    "model.multi_modal_projector.linear_2.": f"{PROJECTOR}2.",
    "model.vision_tower.": f"{TOWER}vision_model.",
}
"""How names in the live model begin -> how LLaVA's do; lm_head is the same."""
READ: dict[str, tuple[str | bool, ...]] = {
    "mm_projector_type": (MLP,),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "image_aspect_ratio": ("pad", "square"),
}
"""Values that config.json must have, if it has them at all, for a LLaVA that is built as ours are."""


def is_llava(name: str) -> bool:
    """Return whether a tensor is of LLaVA's projector, by its name."""
    return "mm_projector." in name


def xtuner_name(name: str) -> str:
    """Return a LLaVA tensor's name as XTuner would have it."""
    if ".lora_A." in name or ".lora_B." in name:
        return f"llm.{name.replace('.lora_A.', '.lora_A.default.').replace('.lora_B.', '.lora_B.default.')}"
    name = name.removeprefix(PEFT)
    if name.startswith(("mm_projector.", PROJECTOR)):
        return f"projector.model.{name.partition('mm_projector.')[2]}"
    if name.startswith(TOWER):
        return f"visual_encoder.{name.removeprefix(TOWER)}"
    return f"llm.{name}"


def xtuner_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return LLaVA's tensors under XTuner's names."""
    return {xtuner_name(name): weight for name, weight in weights.items()}


def llava_name(live: str) -> str:
    """Return a live weight's name as LLaVA has it; its adapters are merged before."""
    for ours, theirs in LIVE_NAMES.items():
        if live.startswith(ours):
            return theirs + live.removeprefix(ours)
    return live


def recipe_fields(config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the fields of a recipe that LLaVA's config.json tells, by dotted name.

    Raises:
        ModelError: it says that the model saw pictures otherwise than ours can.
    """
    for name, known in READ.items():
        if (value := config.get(name)) is not None and value not in known:
            raise ModelError(
                f"{where}: {name} is {json.dumps(value)}, only {' and '.join(map(json.dumps, known))} can be read; "
                "take another checkpoint, or correct it if it is not what the run had"
            )
    found = {
        "vision_tower.folder": config.get("mm_vision_tower"),
        "vision_tower.feature_layer": config.get("mm_vision_select_layer"),
        "data.aspect": "pad" if config.get("image_aspect_ratio") == "pad" else "crop",
    }
    return {name: value for name, value in found.items() if value is not None}
