"""Recipe -> the formats that cannot hold its model, known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dianjing.config.schema import Recipe
from dianjing.export.formats import FORMATS
from dianjing.model.folders import resolve
from dianjing.model.language import empty_language_model
from dianjing.model.projector import KINDS
from dianjing.model.towers.families import tower_config


def refusals(recipe: Recipe) -> dict[str, str]:
    """Return the reasons by name of format; only the configurations of LLM and tower are read.

    Raises:
        ModelError: a folder is not a model that can be used.
    """
    llm = resolve(recipe.language_model.folder, "language_model", weights=False)
    tower = tower_config(resolve(recipe.vision_tower.folder, "vision_tower", weights=False))
    text = empty_language_model(llm, torch.float32).config
    reasons = {name: format.code.can_hold(tower, text) for name, format in FORMATS.items()}
    kind = KINDS[recipe.projector.kind]
    reasons |= {name: reason for name in FORMATS if (reason := kind.refusal(name))}
    return {name: reason for name, reason in reasons.items() if reason}


def as_lines(refused: Mapping[str, str]) -> list[str]:
    """Return one line for each format."""
    return [f"this run will not export to {name}: {reason}" for name, reason in refused.items()]
