"""A record as the model of a recipe sees it: preprocessed pictures, and its supervised tokens."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from dianjing.config.load import load_recipe
from dianjing.data.record import Place, parse_record
from dianjing.pictures.picture import load_image

if TYPE_CHECKING:
    from dianjing.data.encode import Encoder
    from dianjing.pictures.image import ImageProcessor


class ModelView:
    """Reads records as training does; tokenizer and preprocessing of a recipe are loaded once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reader = lru_cache(maxsize=8)(_reader)

    def text(self, recipe: str, fields: Mapping[str, Any], place: Place) -> dict[str, Any]:
        """Return the tokens of a record as text, in parts of one kind.

        Raises:
            DianjingError: the recipe, a folder or the record cannot be used.
        """
        from dianjing.infer.segments import headline, segments

        with self._lock:
            encoder, _ = self._reader(recipe, os.stat(recipe).st_mtime_ns)
            example = encoder.encode(parse_record(dict(fields), place)[0])
            parts = segments(example, encoder)
        return {
            "headline": headline(example),
            "parts": [{"kind": part.kind, "text": part.text} for part in parts],
        }

    def picture(self, recipe: str, root: str, name: str) -> Image:
        """Return a picture as the vision tower gets it.

        Raises:
            DianjingError: the recipe, a folder or the picture cannot be used.
        """
        with self._lock:
            _, processor = self._reader(recipe, os.stat(recipe).st_mtime_ns)
        return processor.to_picture(processor(load_image(root, name, processor.rule)))


def _reader(path: str, modified: int) -> tuple[Encoder, ImageProcessor]:
    from dianjing.infer.segments import reader_of  # slow to import: torch, transformers
    from dianjing.start import settle

    return reader_of(settle(load_recipe(path)))
