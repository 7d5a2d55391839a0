"""The rule by which the pictures of a data set are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dianjing.config.schema import DataConfig
from dianjing.errors import DataError

NAME_SHOWN = 200
"""Characters of a name in a message."""
Profiles = Literal["srgb", "ignore"]
Transparency = Literal["white", "drop"]


class PictureError(DataError):
    """Why a picture cannot be used."""

    def __init__(self, code: str, name: str, message: str) -> None:
        super().__init__(f'picture "{name[:NAME_SHOWN]}": {message}')
        self.code = code


@dataclass(frozen=True, kw_only=True)
class PictureRule:
    """How pictures are read; a run has one, and so has everything that asks its model."""

    white: int = 0
    """The value that is white in pictures of more than 8 bits which name none themselves; 0 = not known."""
    profiles: Profiles = "srgb"
    """Embedded colour profiles are applied, or ignored (XTuner and LLaVA)."""
    transparency: Transparency = "white"
    """Transparent pictures are laid on white, or their alpha channel is dropped (XTuner and LLaVA)."""

    @classmethod
    def of(cls, data: DataConfig) -> PictureRule:
        """Return the rule of a recipe."""
        return cls(white=data.white, profiles=data.profiles, transparency=data.transparency)

    @classmethod
    def read(cls, fields: Any) -> PictureRule:
        """Return the rule that the fields of an export describe.

        Raises:
            ValueError: they are of another kind.
        """
        rule = cls(**fields)
        choices = rule.profiles in get_args(Profiles) and rule.transparency in get_args(Transparency)
        if not choices or type(rule.white) is not int or rule.white < 0:
            raise ValueError(f"it reads pictures in a way that is not known here: {fields}")
        return rule


PLAIN = PictureRule()
