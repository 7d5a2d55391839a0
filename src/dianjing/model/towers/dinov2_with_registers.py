"""DINOv2 with registers: tokens next to the class token that are not places of the picture."""

from __future__ import annotations

from typing import Any

from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from dianjing.model.towers.dinov2 import Dinov2
from dianjing.model.towers.tower import Layouts


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with register tokens behind the class token."""

    name = "DINOv2 with registers"
    model_types = ("dinov2_with_registers",)
    config_class, model_class = Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    prefixes = ("dinov2_with_registers.",)

    def extra_tokens(self, config: Any) -> int:
        """Return the class token and the registers."""
        return 1 + config.num_register_tokens

    def layouts(self, config: Any) -> Layouts:
        """Return none: LLaVA would take the registers for patches."""
        return frozenset()
