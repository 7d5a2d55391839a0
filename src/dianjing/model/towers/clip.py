"""CLIP's vision tower, alone or out of a whole CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dianjing.layers.fused.tower import embedded, fuse_tower_layers, is_tower_layer, through_tower
from dianjing.model.towers.tower import Layouts, Tower


class Clip(Tower):
    """A class token, a norm before the layers, a norm behind them that no feature passes."""

    name = "CLIP"
    model_types = ("clip_vision_model", "clip")
    config_class, model_class = CLIPVisionConfig, CLIPVisionModel
    layers_name = "encoder.layers"
    unused = ("post_layernorm.",)
    prefixes = ("vision_model.",)
    not_needed = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of the vision side."""
        whole = config.get("model_type") == self.model_types[1]
        return dict(config.get("vision_config") or {}) if whole else dict(config)

    def weights(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's tensors; old files also hold the row numbers of the position embedding."""
        found = super().weights(read)
        return {name: weight for name, weight in found.items() if not name.endswith(".position_ids")}

    def extra_tokens(self, config: Any) -> int:
        """Return 1, the class token."""
        return 1

    def layouts(self, config: Any) -> Layouts:
        """Return all formats."""
        return frozenset({"hf", "llava", "xtuner", "gguf"})

    def states(
        self,
        tower: Any,
        pixel_values: Float[Tensor, "images 3 height width"],
        depth: int,
        fused: Sequence[Any] | None = None,
    ) -> Float[Tensor, "images states width"]:
        """Return the hidden states after `depth` layers."""
        hidden = self.enter(
            tower, embedded(tower.embeddings, pixel_values) if fused else tower.embeddings(pixel_values)
        )
        if fused:
            return through_tower(fused, hidden)
        for layer in self.layers(tower)[:depth]:
            hidden = layer(hidden, None)
        return hidden

    def enter(self, tower: Any, hidden: Tensor) -> Tensor:
        """Return what enters the first layer."""
        return tower.pre_layrnorm(hidden)

    def fuse(self, layers: Sequence[nn.Module]) -> Sequence[Any] | None:
        """Return the layers fused; None if one of them is of another kind or learns itself."""
        return fuse_tower_layers(layers)

    def can_fuse(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether `fuse` would return something."""
        return all(map(is_tower_layer, layers))
