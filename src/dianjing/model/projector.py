"""The kinds of projectors: what lies between the features of a tower and the LLM's embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dianjing.data.picture_tokens import FixedCount, PictureTokens, Size
from dianjing.errors import ModelError
from dianjing.formats.xtuner import LINEARS
from dianjing.model.linear_projector import LinearProjector
from dianjing.model.pixel_shuffle import SIDE, PixelShuffleProjector
from dianjing.model.towers.families import num_features, tower_family
from dianjing.model.towers.tower import Layouts


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of projector: one or two linear layers, `linear_1` and `linear_2`, and what happens around them."""

    module: Callable[[LlavaConfig], nn.Module]
    """A class; its forward takes (pictures, features, width) and returns (pictures, tokens, hidden)."""
    words: str
    """Its name in messages."""
    merges: int = 1
    """Side of the square of features that become one token."""
    foreign: Mapping[str, str] | None = None
    """Layer -> its number in XTuner's and LLaVA's sequence; None: they have no such projector."""
    layouts: Layouts
    """Export formats that can hold it; "adapter" always can."""

    def tokens(self, features: int) -> int:
        """Return the number of tokens that this many features become."""
        return features // self.merges**2

    def new(self, config: LlavaConfig, seed: int) -> nn.Module:
        """Return a projector with torch's own initial weights for linear layers, as LLaVA's and XTuner's have them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.module(config)


KINDS: dict[str, Kind] = {
    "mlp": Kind(
        module=LlavaMultiModalProjector,
        words="two linear layers with biases",
        foreign={layer: number for number, layer in LINEARS.items()},
        layouts=frozenset({"hf", "llava", "xtuner", "gguf"}),
    ),
    "pixel_shuffle": Kind(
        module=PixelShuffleProjector,
        words=f"two linear layers with biases on squares of {SIDE} by {SIDE} features",
        merges=SIDE,
        layouts=frozenset(),
    ),
    "linear": Kind(module=LinearProjector, words="one linear layer with a bias", layouts=frozenset()),
}
"""By the name that a recipe gives them (projector.kind)."""


def kind_of(projector: nn.Module) -> Kind:
    """Return the kind of a projector."""
    return next(kind for kind in KINDS.values() if type(projector) is kind.module)


def name_of(projector: nn.Module) -> str:
    """Return the name of a projector's kind."""
    return next(name for name, kind in KINDS.items() if type(projector) is kind.module)


def picture_tokens(config: Any, size: Size, kind: Kind) -> PictureTokens:
    """Return how many tokens pictures have in a LLaVA of this configuration, prepared pictures being of this size.

    Raises:
        ModelError: the grid of features cannot be divided into the projector's squares.
    """
    rows, columns = tower_family(config.vision_config).grid(config.vision_config, size)
    if kind.merges > 1 and (rows % kind.merges or rows != columns):
        raise ModelError(
            f"a picture has {rows} by {columns} features, which squares of {kind.merges} by {kind.merges} do not fill; "
            'set projector.kind to "mlp", or take a vision tower with another size of pictures'
        )
    return FixedCount(kind.tokens(num_features(config.vision_config, config.vision_feature_select_strategy, size)))
