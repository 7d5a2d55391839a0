"""A folder with a vision tower -> the tower, of the family it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dianjing.data.picture_tokens import Size
from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.llava_folder import is_llava_config, is_llava_folder, part_config, part_weights
from dianjing.formats.weights import read_weights
from dianjing.model.language import LoadReport, count, load_exactly, make_config
from dianjing.model.towers.clip import Clip
from dianjing.model.towers.dinov2 import Dinov2
from dianjing.model.towers.dinov2_with_registers import Dinov2WithRegisters
from dianjing.model.towers.dinov3 import Dinov3
from dianjing.model.towers.siglip import Siglip
from dianjing.model.towers.tower import Tower
from dianjing.model.towers.vit import ViT

FAMILIES: tuple[Tower, ...] = (Clip(), Siglip(), Dinov2(), Dinov2WithRegisters(), Dinov3(), ViT())


def tower_family(config: Any) -> Tower:
    """Return the family of a tower's configuration."""
    return next(family for family in FAMILIES if config.model_type in family.model_types)


def family_named(model_type: str, where: object) -> Tower:
    """Return the family of a model_type.

    Raises:
        ModelError: there is none.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if model_type.removesuffix("_vision_model") == "siglip2":
        raise ModelError(
            f'{where}: model_type "{model_type}" is a SigLIP 2 of any resolution (NaFlex), whose number of patches '
            "changes with each picture; give one of the SigLIP 2 towers of fixed size, such as "
            "siglip2-so400m-patch14-384"
        )
    names = ", ".join(family.name for family in FAMILIES)
    raise ModelError(
        f'{where}: model_type "{model_type}" is none of the vision towers that can be read ({names}); give the folder '
        "of one, or of a model that contains it"
    )


def tower_config(folder: Path) -> Any:
    """Return the configuration of the tower in a folder; of a LLaVA in transformers' layout, that of its tower.

    Raises:
        ModelError: it is of no known family.
    """
    config = read_config(folder)
    if is_llava_config(config):
        config = part_config(folder, config, "vision_config")
    family = family_named(str(config.get("model_type")), folder)
    return make_config(family.config_class, folder, family.settings(config))


def load_tower(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Return the vision tower of a folder, its weights in `dtype`, and what was read.

    Raises:
        ModelError: the folder has no tower of a known family, or its weights are not exactly the tower's.
    """
    folder = Path(folder)
    config = tower_config(folder)
    family = tower_family(config)
    read = part_weights(folder, "vision_tower") if is_llava_folder(folder) else dict(read_weights(folder))
    weights = family.weights(read)
    tower = load_exactly(
        family.model_class, folder, dtype=dtype, weights=weights, config=config, **family.model_settings
    )
    unread = len(read) - len(weights)
    rest = f" ({unread} other tensors there are not needed)" if unread else ""
    return tower, LoadReport((f"vision tower: {type(tower).__name__}, {count(tower)} from {folder}{rest}",))


def empty_tower(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the vision tower of a folder's config.json, its weights without numbers (torch's meta device).

    Raises:
        ModelError: it is of no known family.
    """
    config = tower_config(Path(folder))
    family = tower_family(config)
    with torch.device("meta"):
        return family.model_class._from_config(config, dtype=dtype, **family.model_settings)


def prepared_size(folder: Path, config: Any) -> Size:
    """Return the height and width of pictures as a folder's tower gets them.

    Raises:
        ModelError: the preprocessing says so, and is not there.
    """
    family = tower_family(config)
    side = config.image_size if family.sized_by_config else family.preprocessing(folder).size
    return side, side


def layers_of(tower: Any) -> Any:
    """Return the layers of a tower, a ModuleList."""
    return tower_family(tower.config).layers(tower)


def select_strategy(config: Any) -> str:
    """Return what LLaVA's configuration says of a tower's features: "default" leaves the first out, "full" none."""
    return "default" if tower_family(config).extra_tokens(config) else "full"


def left_out(config: Any, strategy: str) -> int:
    """Return how many of a picture's states are not read: "default" leaves the extra tokens out, and at least one."""
    return max(1, tower_family(config).extra_tokens(config)) if strategy == "default" else 0


def num_features(config: Any, strategy: str, size: Size) -> int:
    """Return how many features a prepared picture has."""
    family = tower_family(config)
    rows, columns = family.grid(config, size)
    return rows * columns + family.extra_tokens(config) - left_out(config, strategy)
