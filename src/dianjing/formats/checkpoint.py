"""Content of a checkpoint from elsewhere, the same for each program and form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The settings of a LoRA that its tensors do not tell."""

    alpha: float
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A checkpoint in the names of XTuner's state_dict: llm.*, visual_encoder.*, projector.model.*."""

    kind: str
    """In words, for messages."""
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Of the weights that AdamW has moved: its step, exp_avg and exp_avg_sq."""
    iteration: int = 0
    """Batches that the run had taken on each GPU."""
    seed: int | None = None
    config: str = ""
    """The text of XTuner's config, "" when there is none."""
    last_iteration: int = 0
    """Where the schedule of the learning rate ends; 0 = not known."""
    ranks: int = 0
    """GPUs of the run; 0 = not known."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    """By part, "llm" or "visual_encoder", if a file next to the tensors has them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a recipe, by dotted name, from other files next to the tensors."""
