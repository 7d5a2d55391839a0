"""The folder of a model that a recipe or a flag names: one's own, a packaged one, or one of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from dianjing.config.schema import Recipe
from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.folder_kind import eyes_already, wrong_folder
from dianjing.formats.gguf import is_gguf
from dianjing.model.hub import hub_folder, is_hub_name

TINYWORLD = "tinyworld"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
Part = Literal["language_model", "vision_tower"]


def resolve(folder: str, part: Part, *, weights: bool = True) -> Path:
    """Return the folder to read: `folder` itself, the packaged one for "tinyworld", or that of owner/name on the hub.

    A folder of one's own that is called tinyworld is written "./tinyworld". Without `weights`, what is downloaded
    has none.

    Raises:
        ModelError: the folder does not exist.
    """
    if not folder:
        raise ModelError(f"{part}.folder is not given; name a folder there, or a model that sees in start_from")
    path = Path(__file__).parents[1] / TINYWORLD / "models" / part if folder == TINYWORLD else Path(folder).expanduser()
    if path.is_file() and path.suffix in WEIGHTS:
        raise ModelError(f"{folder}: a file of weights, where a folder is needed; give the folder it lies in")
    if is_gguf(path):
        raise ModelError(
            f"{folder}: a GGUF file, where a folder is needed; make one: dianjing import {folder} models/{path.stem}"
        )
    if not path.is_dir():
        if is_hub_name(folder):
            return hub_folder(folder, weights=weights)
        kind = part.replace("_", " ")
        raise ModelError(
            f"{folder}: no such {kind} folder; give a folder on this machine, a model of the hub (owner/name), "
            f'or "{TINYWORLD}"'
        )
    return path


def check_models(recipe: Recipe, *, weights: bool = True) -> None:
    """Look for the models of a recipe and at their config.json, without torch; `weights` as for `resolve`.

    Raises:
        ModelError: a folder does not exist, or is not one of a model.
    """
    read_config(_base(recipe.language_model.folder, "language_model", weights))
    read_config(_base(recipe.vision_tower.folder, "vision_tower", weights))


def _base(folder: str, part: Part, weights: bool) -> Path:
    path = resolve(folder, part, weights=weights)
    if problem := wrong_folder(path) or eyes_already(path):
        raise ModelError(f"{folder}: {problem}")
    return path


def projector_source(init_from: str | Path) -> Path:
    """Return the path that projector.init_from names.

    Raises:
        ModelError: nothing is there.
    """
    path = Path(init_from).expanduser()
    if not os.path.exists(path):
        raise ModelError(f"{path}: no such run or checkpoint; projector.init_from names one to take the projector from")
    return path


def base_folders(recipe: Recipe) -> tuple[Path, Path]:
    """Return the folders of a recipe's base LLM and vision tower.

    Raises:
        ModelError: a folder does not exist.
    """
    llm, tower = recipe.language_model.folder, recipe.vision_tower.folder
    return _base(llm, "language_model", True), _base(tower, "vision_tower", True)
