"""A projector that joins each square of features to one token: fewer tokens a picture, each as wide as four."""

from __future__ import annotations

from math import isqrt
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

SIDE = 2
"""Of the square, in features."""


class PixelShuffleProjector(nn.Module):
    """Two linear layers with biases on squares of SIDE by SIDE features."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size * SIDE**2, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Float[Tensor, "images features width"]) -> Float[Tensor, "images tokens hidden"]:
        """Return the tokens of pictures; each picture's features are a square grid, row by row."""
        rows = isqrt(features.shape[1]) // SIDE
        grid = features.unflatten(1, (rows, SIDE, rows, SIDE))  # (images, rows, SIDE, rows, SIDE, width)
        squares = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.linear_2(gelu(self.linear_1(squares)))
