"""A folder with a CLIP vision tower, or a whole CLIP, -> the tower."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from dianjing.errors import ModelError
from dianjing.model.language import LoadReport, count, load_exactly, read_config, read_weights, require_safetensors

PREFIX = "vision_model."
"""Stands before the tower's names in a whole CLIP, and in a tower that transformers 4 saved."""

TEXT_SIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
"""What a whole CLIP has beside its tower."""


def load_vision_tower(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Return the vision tower of a folder, its weights in `dtype`, and what was read.

    Raises:
        ModelError: the folder has no CLIP, or its weights are not exactly the tower's.
    """
    folder = Path(folder)
    config = read_config(folder)
    require_safetensors(folder)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ModelError(f'{folder}: model_type "{kind}" is no CLIP; give the folder of a CLIP or a CLIP vision tower')
    read = dict(read_weights(folder))
    weights = {
        name.removeprefix(PREFIX): weight
        for name, weight in read.items()
        # Old checkpoints also save the row numbers of the position embedding.
        if not name.startswith(TEXT_SIDE) and not name.endswith(".position_ids")
    }
    settings = CLIPVisionConfig(**config["vision_config"] if kind == "clip" else config)
    tower = load_exactly(CLIPVisionModel, folder, dtype=dtype, weights=weights, config=settings)
    unread = len(read) - len(weights)
    rest = f" ({unread} other tensors of the CLIP not needed)" if unread else ""
    return tower, LoadReport((f"vision tower: {type(tower).__name__}, {count(tower)} from {folder}{rest}",))
