"""A LLaVA in transformers' layout -> its LLM, tower and projector, under the names of transformers 4.x or 5.x.

language_model.model.layers.0...    model.language_model.layers.0...    -> model.layers.0...
language_model.lm_head.weight       lm_head.weight                      -> lm_head.weight
vision_tower.vision_model...        model.vision_tower...               -> the tower's own names
multi_modal_projector.linear_1...   model.multi_modal_projector...      -> linear_1...
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.weights import name_some, read_weights

Part = Literal["language_model", "vision_tower", "projector"]
MODEL_TYPES = ("llava", "llava_next")
PREFIXES: tuple[tuple[Part, str, str], ...] = (
    ("language_model", "language_model.model.", "model."),
    ("language_model", "language_model.lm_head.", "lm_head."),
    ("language_model", "model.language_model.", "model."),
    ("language_model", "lm_head.", "lm_head."),
    ("vision_tower", "vision_tower.", ""),
    ("vision_tower", "model.vision_tower.", ""),
    ("projector", "multi_modal_projector.", ""),
    ("projector", "model.multi_modal_projector.", ""),
)
"""Part, how a name begins in the file, and how it begins in the part alone."""
NEWLINE = ("image_newline", "model.image_newline")
"""LLaVA-NeXT's mark between rows of tiles. It is not read: each picture is seen as one square."""
HEAD = "lm_head.weight"


def is_llava_config(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a LLaVA which can be taken apart."""
    return config.get("model_type") in MODEL_TYPES


def is_llava_folder(folder: Path) -> bool:
    """Return whether a folder holds a LLaVA in transformers' layout."""
    return (folder / "config.json").is_file() and is_llava_config(read_config(folder))


def part_config(folder: Path, config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the configuration of the LLM (text_config) or the tower (vision_config) in a LLaVA's config.json.

    Raises:
        ModelError: there is none.
    """
    found = config.get(part)
    if not isinstance(found, dict) or "model_type" not in found:
        raise ModelError(f"{folder}/config.json: {part} with a model_type is missing; copy the folder again")
    return dict(found)


def part_weights(folder: Path, part: Part) -> dict[str, Tensor]:
    """Return the tensors of one part by its own names; those of the others are not read.

    Raises:
        ModelError: a tensor is of no part of a LLaVA, or a file cannot be read.
    """
    strange: list[str] = []

    def wanted(name: str) -> bool:
        owner = _place(name)[0]
        if owner is None and name not in NEWLINE:
            strange.append(name)
        return owner == part

    found = {_place(name)[1]: weight for name, weight in read_weights(folder, wanted)}
    if strange:
        raise ModelError(f"{folder}: {name_some(strange)} left over: of no part of a LLaVA; copy the folder again")
    return found


def _place(name: str) -> tuple[Part | None, str]:
    for part, written, own in PREFIXES:
        if name.startswith(written):
            return part, own + name.removeprefix(written)
    return None, name
