"""The sizes of a LLaVA on which operations and activations depend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dianjing.model.forward import num_tower_layers
from dianjing.model.projector import kind_of
from dianjing.model.towers.families import tower_family


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A Llama-like LLM and a vision tower; as they stand, InternLM2-1.8B and CLIP ViT-L/14-336."""

    layers: int = 24
    hidden: int = 2048
    heads: int = 2048
    """Query heads times their size."""
    kv_heads: int = 1024
    mlp: int = 8192
    vocabulary: int = 92544
    tower_layers: int = 23
    """Up to the layer that is read (feature_layer -2)."""
    tower_width: int = 1024
    tower_mlp: int = 4096
    patches: int = 576
    """Features of one picture, as the projector gets them."""
    image_tokens: int = 576
    """Tokens that the projector makes of them."""
    positions: int = 577
    """Patches, and class and register tokens."""
    patch_inputs: int = 588
    """Numbers in a patch of the picture."""

    @property
    def linear(self) -> int:
        """Parameters of the decoder's linear layers."""
        attention = self.hidden * (self.heads + 2 * self.kv_heads) + self.heads * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def fan(self) -> int:
        """Inputs and outputs of a decoder layer's seven linear layers, added up."""
        attention = 3 * self.hidden + self.heads + 2 * self.kv_heads + self.heads + self.hidden
        return attention + 3 * (self.hidden + self.mlp)

    @property
    def tower_fan(self) -> int:
        """Inputs and outputs of a tower layer's six linear layers, added up."""
        return 4 * 2 * self.tower_width + 2 * (self.tower_width + self.tower_mlp)


INTERNLM2_1_8B = Shapes()


def shapes_of(model: Any) -> Shapes:
    """Return the sizes of a LLaVA, with or without weights."""
    text, vision = model.config.text_config, model.config.vision_config
    query_heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    kind, family = kind_of(model.model.multi_modal_projector), tower_family(vision)
    tokens = model.config.image_seq_length
    patches = tokens * kind.merges**2
    return Shapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=query_heads * head_size,
        kv_heads=(getattr(text, "num_key_value_heads", None) or query_heads) * head_size,
        mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        tower_layers=num_tower_layers(model),
        tower_width=vision.hidden_size,
        tower_mlp=family.mlp_width(vision),
        patches=patches,
        image_tokens=tokens,
        positions=patches + family.extra_tokens(vision),
        patch_inputs=3 * vision.patch_size**2,
    )
