"""Where the packaged base models of the tiny world live."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dianjing.errors import ModelError

NAME = "tinyworld"
Part = Literal["language_model", "vision_tower"]


def resolve(folder: str, part: Part) -> Path:
    """Return the folder to read: the packaged one for "tinyworld", else `folder` itself.

    A folder of one's own that is called tinyworld is written "./tinyworld".

    Raises:
        ModelError: the folder does not exist.
    """
    path = Path(__file__).parent / "models" / part if folder == NAME else Path(folder).expanduser()
    if not path.is_dir():
        kind = part.replace("_", " ")
        raise ModelError(f'{folder}: no such {kind} folder; give a folder on this machine, or "{NAME}"')
    return path
