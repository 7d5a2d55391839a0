"""The plain ViT, alone or out of an image classifier; the first DINO is one."""

from __future__ import annotations

from typing import Any

from transformers import ViTConfig, ViTModel

from dianjing.model.towers.tower import Tower


class ViT(Tower):
    """A class token before the patches. transformers' LLaVA expects a pooler, so it holds none."""

    name = "ViT"
    model_types = ("vit",)
    config_class, model_class = ViTConfig, ViTModel
    model_settings = {"add_pooling_layer": False}  # noqa: RUF012 (nobody changes it)
    layers_name = "layers"
    unused = ("layernorm.",)
    prefixes = ("vit.",)
    not_needed = ("classifier.", "pooler.", "embeddings.mask_token", "decoder.")

    def extra_tokens(self, config: Any) -> int:
        """Return 1, the class token."""
        return 1
