"""A projector of one linear layer, as the first LLaVA had it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class LinearProjector(nn.Module):
    """One linear layer with a bias."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Float[Tensor, "images features width"]) -> Float[Tensor, "images features hidden"]:
        """Return a token for each feature."""
        return self.linear_1(features)
