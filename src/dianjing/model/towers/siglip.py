"""The vision tower of SigLIP or of SigLIP 2 of fixed size, alone or out of a whole SigLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from dianjing.model.towers.clip import Clip
from dianjing.model.towers.tower import Layouts


class Siglip(Clip):
    """CLIP's tower without class token and first norm; a head pools the patches, and no patch sees it."""

    name = "SigLIP"
    model_types = ("siglip_vision_model", "siglip")
    config_class, model_class = SiglipVisionConfig, SiglipVisionModel
    unused = ("post_layernorm.", "head.")
    not_needed = (*Clip.not_needed, "head.")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the vision side, without the pooling head."""
        return super().settings(config) | {"vision_use_head": False}

    def extra_tokens(self, config: Any) -> int:
        """Return 0."""
        return 0

    def layouts(self, config: Any) -> Layouts:
        """Return all formats but those of XTuner and LLaVA 1.5, which know CLIP alone."""
        return frozenset({"hf", "gguf"})

    def enter(self, tower: Any, hidden: Tensor) -> Tensor:
        """Return what enters the first layer: the embeddings."""
        return hidden
