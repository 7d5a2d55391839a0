"""DINOv3's ViT: rotary positions that each layer is given, and registers in the models of the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dianjing.model.towers.tower import Layouts, Tower


class Dinov3(Tower):
    """A class token and registers before the patches; positions turn queries and keys in each layer."""

    name = "DINOv3 ViT"
    model_types = ("dinov3_vit",)
    config_class, model_class = DINOv3ViTConfig, DINOv3ViTModel
    layers_name = "model.layer"
    unused = ("norm.", "embeddings.mask_token")
    sized_by_config = False

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json without the random changes of positions that DINOv3's own training made."""
        return dict(config) | {"pos_embed_shift": None, "pos_embed_jitter": None, "pos_embed_rescale": None}

    def extra_tokens(self, config: Any) -> int:
        """Return the class token and the registers."""
        return 1 + config.num_register_tokens

    def mlp_width(self, config: Any) -> int:
        """Return the MLP's inner width; a gated one has three matrices."""
        return config.intermediate_size * 3 // 2 if config.use_gated_mlp else config.intermediate_size

    def hub_name(self, name: str) -> str:
        """Return the name as the tower's own files have it."""
        return name.removeprefix("model.")

    def layouts(self, config: Any) -> Layouts:
        """Return transformers' LLaVA for a model without registers, which it would take for patches."""
        return frozenset() if config.num_register_tokens else frozenset({"hf"})

    def states(
        self,
        tower: Any,
        pixel_values: Float[Tensor, "images 3 height width"],
        depth: int,
        fused: Sequence[Any] | None = None,
    ) -> Float[Tensor, "images states width"]:
        """Return the hidden states after `depth` layers, each given the rotary positions."""
        hidden, positions = tower.embeddings(pixel_values), tower.rope_embeddings(pixel_values)
        for layer in self.layers(tower)[:depth]:
            hidden = layer(hidden, position_embeddings=positions)
        return hidden
