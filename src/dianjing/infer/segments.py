"""The tokens of a record as text again, cut into supervised ones, others and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from dianjing.config.schema import ProjectorKind, Recipe
from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Encoder, Example, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount, PictureTokens
from dianjing.data.template import template_for
from dianjing.language import say
from dianjing.model.folders import resolve
from dianjing.pictures.rule import PictureRule

if TYPE_CHECKING:
    from dianjing.pictures.image import ImageProcessor


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one kind: "plain", "supervised", or "picture" (one picture each)."""

    kind: str
    text: str


def segments(example: Example, encoder: Encoder) -> list[Segment]:
    """Return a record as text again, cut where the kind of its tokens changes."""
    pictures = zip(example.images, example.image_lengths, strict=True)
    found: list[Segment] = []

    def kind(pair: tuple[int, int]) -> str:
        token, label = pair
        if token == encoder.image_token_id:
            return "picture"
        return "plain" if label == IGNORE_INDEX else "supervised"

    for name, pairs in groupby(zip(example.input_ids, example.labels, strict=True), kind):
        ids = [token for token, _ in pairs]
        if name == "picture":
            while ids:
                image, length = next(pictures)
                found.append(Segment(name, say("[{image}: {number} image tokens]", image=image, number=length)))
                del ids[:length]
        else:
            text = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            found.append(Segment(name, str(text)))
    return found


def headline(example: Example) -> str:
    """Return the record's name and measures in one line."""
    supervised = sum(label != IGNORE_INDEX for label in example.labels)
    cut = say(", {number} tokens cut off", number=example.truncated) if example.truncated else ""
    return say(
        "{id}: {positions} positions, {supervised} of them supervised{cut}",
        id=example.id,
        positions=len(example.input_ids),
        supervised=supervised,
        cut=cut,
    )


def picture_tokens_of(tower: Path, projector: ProjectorKind = "mlp") -> PictureTokens:
    """Return how many tokens pictures become with the vision tower of a folder."""
    # Imported here because it takes seconds, and only a tower needs it.
    from dianjing.model.projector import KINDS
    from dianjing.model.towers.families import num_features, prepared_size, select_strategy, tower_config

    config = tower_config(tower)
    features = num_features(config, select_strategy(config), prepared_size(tower, config))
    return FixedCount(KINDS[projector].tokens(features))


def reader_of(recipe: Recipe) -> tuple[Encoder, ImageProcessor]:
    """Return how a run with this recipe reads records and pictures; no weights are loaded.

    Raises:
        ModelError: a folder, a tokenizer or a template does not fit.
    """
    from dianjing.pictures.image import ImageProcessor  # imports torch

    tokenizer = load_tokenizer(resolve(recipe.language_model.folder, "language_model", weights=False))
    tower = resolve(recipe.vision_tower.folder, "vision_tower", weights=False)
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template_for(tokenizer, recipe.language_model.template)[0],
        picture_tokens=picture_tokens_of(tower, recipe.projector.kind),
        max_tokens=recipe.data.max_tokens,
        on_long_record=recipe.data.on_long_record,
        image_token_id=image_token_id(tokenizer),
    )
    return encoder, ImageProcessor.from_folder(tower, recipe.data.aspect, PictureRule.of(recipe.data))
