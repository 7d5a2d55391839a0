"""DINOv2, alone or out of an image classifier; positions are interpolated to the size of the prepared picture."""

from __future__ import annotations

from typing import Any

from transformers import Dinov2Config, Dinov2Model

from dianjing.model.towers.tower import Layouts, Tower


class Dinov2(Tower):
    """A class token before the patches; no text side."""

    name = "DINOv2"
    model_types = ("dinov2",)
    config_class, model_class = Dinov2Config, Dinov2Model
    layers_name = "encoder.layer"
    unused = ("layernorm.", "embeddings.mask_token")
    prefixes = ("dinov2.",)
    not_needed = ("classifier.",)
    sized_by_config = False

    def extra_tokens(self, config: Any) -> int:
        """Return 1, the class token."""
        return 1

    def mlp_width(self, config: Any) -> int:
        """Return the MLP's inner width; SwiGLU has three matrices of two thirds of it, rounded up to eights."""
        inner = int(config.hidden_size * config.mlp_ratio)
        return (int(inner * 2 / 3) + 7) // 8 * 8 * 3 // 2 if config.use_swiglu_ffn else inner

    def hub_name(self, name: str) -> str:
        """Return the name as the tower's own files have it."""
        return name

    def layouts(self, config: Any) -> Layouts:
        """Return transformers' LLaVA, which leaves one token out, as it must be here."""
        return frozenset({"hf"})
