"""All that the page can reach, in one place: the review, the runs, the models, pictures of one's own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from dianjing.config.load import find_recipe
from dianjing.errors import DataError
from dianjing.studio.model_view import ModelView
from dianjing.studio.models import Models
from dianjing.studio.propose import Proposer
from dianjing.studio.runs import Runs
from dianjing.studio.session import ReviewSession

UPLOADS = 4
"""Pictures of one's own that are in memory at once."""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """All that the page can reach."""

    folder: Path
    runs: Runs
    models: Models
    named_models: tuple[str, ...] = ()
    recipe: str = ""
    """Shows what its model sees, when the folder has no recipe of its own."""
    session: ReviewSession | None = None
    proposer: Proposer | None = None
    model_view: ModelView = field(default_factory=ModelView)
    uploads: OrderedDict[str, Image] = field(default_factory=OrderedDict)
    """Pictures of one's own by their hash, the oldest first."""

    def close(self) -> list[str]:
        """Stop what goes on, and return the runs that were stopped."""
        self.models.ending.set()
        if self.session:
            self.session.close()
        return self.runs.end()

    def model_path(self, name: str) -> str:
        """Return the folder of a model that may be asked.

        Raises:
            DataError: it is neither named on the command line nor a run of the folder.
        """
        if name in self.named_models:
            return name
        listing = self.runs.listing()
        if name in (*listing["runs"], *listing["exports"]):
            return str(self.runs.folder / name)
        raise DataError(f'no model "{name[:200]}"; name it on the command line (--model)')

    def recipe_path(self, name: str) -> str:
        """Return the file of a recipe whose reading may be shown.

        Raises:
            DataError: it is neither named on the command line nor in the folder.
        """
        return str(find_recipe(name) if name and name == self.recipe else self.runs.recipe(name))

    def keep(self, name: str, image: Image) -> None:
        """Keep a picture of one's own in memory; the oldest one makes room."""
        self.uploads[name] = image
        self.uploads.move_to_end(name)
        while len(self.uploads) > UPLOADS:
            self.uploads.popitem(last=False)

    def upload(self, name: str) -> Image:
        """Return a picture of one's own.

        Raises:
            DataError: it is not in memory any more.
        """
        if name not in self.uploads:
            raise DataError("this picture is not in memory any more; choose it again")
        return self.uploads[name]
