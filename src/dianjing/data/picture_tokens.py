"""Size of a picture -> number of its tokens in the model; everything that counts positions asks this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Size = tuple[int, int]
"""Height and width of a picture in pixels, as it is when it is upright."""


class PictureTokens(Protocol):
    """Counts the tokens of a picture. Its repr says all that the counts depend on."""

    def __call__(self, size: Size | None = None) -> int:
        """Return the number of tokens of a picture of this size; None = a picture that nobody has looked at."""
        ...


@dataclass(frozen=True)
class FixedCount:
    """The same number of tokens for each picture: the tower scales all of them to one size."""

    number: int

    def __call__(self, size: Size | None = None) -> int:
        """Return the number, whatever the size."""
        return self.number


def expand(input_ids: Sequence[int], values: Sequence[int], image_token_id: int, counts: Iterable[int]) -> list[int]:
    """Return `values` with the value at each picture repeated; `counts` are the tokens of the pictures, in order."""
    remaining = iter(counts)
    expanded: list[int] = []
    for token, value in zip(input_ids, values, strict=True):
        expanded += [value] * next(remaining) if token == image_token_id else [value]
    return expanded
