"""A toy projector: one linear layer, to show what a new kind takes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ToyProjector(nn.Module):
    """One linear layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Return a token for each feature."""
        return self.linear(features)
