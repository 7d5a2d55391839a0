"""A folder with a CLIP or SigLIP vision tower, or with the whole two-sided model, -> the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dianjing.errors import ModelError
from dianjing.formats.weights import read_config, read_weights
from dianjing.model.language import LoadReport, count, load_exactly, make_config

PREFIX = "vision_model."
"""Stands before the tower's names in a whole CLIP or SigLIP, and in a tower that transformers 4 saved."""

NOT_NEEDED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias", "head.")
"""What stands beside a tower, and the pooling on top of SigLIP's: no feature of a patch comes from there."""

TOWERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}


def load_vision_tower(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Return the vision tower of a folder, its weights in `dtype`, and what was read.

    Raises:
        ModelError: the folder has no CLIP or SigLIP, or its weights are not exactly the tower's.
    """
    folder = Path(folder)
    config = vision_config(folder)
    _, tower_class = TOWERS[family(config)]
    read = {name.removeprefix(PREFIX): weight for name, weight in read_weights(folder)}
    weights = {
        name: weight
        for name, weight in read.items()
        # Old checkpoints also save the row numbers of the position embedding.
        if not name.startswith(NOT_NEEDED) and not name.endswith(".position_ids")
    }
    tower = load_exactly(tower_class, folder, dtype=dtype, weights=weights, config=config)
    unread = len(read) - len(weights)
    rest = f" ({unread} other tensors there are not needed)" if unread else ""
    return tower, LoadReport((f"vision tower: {type(tower).__name__}, {count(tower)} from {folder}{rest}",))


def empty_vision_tower(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the vision tower of a folder's config.json, its weights without numbers (torch's meta device).

    Raises:
        ModelError: it is of no CLIP or SigLIP.
    """
    config = vision_config(Path(folder))
    _, tower_class = TOWERS[family(config)]
    with torch.device("meta"):
        return tower_class._from_config(config, dtype=dtype)


def vision_config(folder: Path) -> Any:
    """Return the configuration of the tower in a folder.

    Raises:
        ModelError: it is of no CLIP or SigLIP.
    """
    config = read_config(folder)
    kind = str(config.get("model_type"))
    name = kind.removesuffix("_vision_model")
    if name == "siglip2":
        raise ModelError(
            f'{folder}: model_type "{kind}" is a SigLIP 2 of any resolution (NaFlex), whose number of patches changes '
            "with each picture; give one of the SigLIP 2 towers of fixed size, such as siglip2-so400m-patch14-384"
        )
    if name not in TOWERS:
        raise ModelError(
            f'{folder}: model_type "{kind}" is no CLIP or SigLIP; give the folder of one, or of its vision tower'
        )
    settings: dict[str, Any] = dict(config.get("vision_config") or {}) if kind == name else config
    # SigLIP's pooling head sees the patches and is not seen by them.
    pooling: dict[str, Any] = {"vision_use_head": False} if name == "siglip" else {}
    return make_config(TOWERS[name][0], folder, settings | pooling)


def family(config: Any) -> str:
    """Return "clip" or "siglip"."""
    return config.model_type.removesuffix("_vision_model")


def select_strategy(config: Any) -> str:
    """Return which of a tower's features are patches: "default" leaves CLIP's class token out, SigLIP has none."""
    return "default" if family(config) == "clip" else "full"


def num_image_tokens(config: Any, strategy: str) -> int:
    """Return how many features one picture has; "default" leaves the first one out."""
    patches = (config.image_size // config.patch_size) ** 2
    first = 1 if family(config) == "clip" else 0
    return patches + first - (1 if strategy == "default" else 0)
