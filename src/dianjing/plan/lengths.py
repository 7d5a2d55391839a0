"""How long the records of a run are: measured where the data are there, else assumed and said so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

from dianjing.config.schema import Recipe
from dianjing.constants import IGNORE_INDEX
from dianjing.data.dataset import Dataset
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import PictureTokens
from dianjing.data.record import load_records, turns_alone
from dianjing.data.template import template_for
from dianjing.errors import DataError, ModelError

SAMPLE = 2000
"""Records that are encoded to know the lengths of all."""
TEXT = {"pretrain": (40, 25, 1.0), "finetune": (300, 150, 0.94)}
"""Assumed without data: text tokens, supervised ones, and pictures a record (LLaVA-1.5's own data are like that)."""
MANY = 0.95
"""A pack may consist of such records as hold more of something than this share of them."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Means over the records, and what the heaviest pack may hold."""

    tokens: float
    """Positions, pictures expanded."""
    tokens_squared: float
    supervised: float
    pictures: float
    longest: int = 0
    """Positions of the longest record; 0 = as long as a pack."""
    supervised_share: float = 0.5
    """Supervised tokens among the positions of a pack that has many."""
    picture_share: float = 0.0
    """Pictures for each position of a pack that has many."""
    records: int = 0
    """How many there are; 0 = not known."""
    source: str = "given"


def step_records(recipe: Recipe, lengths: Lengths) -> int:
    """Return how many records make an optimizer step: the global batch, or all there are."""
    return min(recipe.train.global_batch_size, lengths.records or recipe.train.global_batch_size)


def assumed_lengths(recipe: Recipe, picture_tokens: PictureTokens, reason: str) -> Lengths:
    """Return what is assumed of records that nobody has looked at; `reason` says why."""
    patches = picture_tokens()
    text, supervised, pictures = TEXT[recipe.stage]
    tokens = text + pictures * patches
    return Lengths(
        tokens=tokens,
        tokens_squared=1.1 * tokens**2,
        supervised=supervised,
        pictures=pictures,
        longest=min(recipe.data.max_tokens + patches - 1, recipe.data.pack_tokens),
        supervised_share=supervised / tokens,
        picture_share=1 / (patches + text / 4),
        source=f"assumed ({reason}): {text} text tokens and {pictures:g} pictures of {patches} positions a record",
    )


def lengths_of(dataset: Dataset) -> Lengths:
    """Return the lengths of an opened data set."""
    number, report = dataset.num_records, dataset.report
    supervised, tokens = report["supervised tokens"] / number, sum(dataset.lengths) / number
    return Lengths(
        tokens=tokens,
        tokens_squared=sum(length**2 for length in dataset.lengths) / number,
        supervised=supervised,
        pictures=report.get("pictures", 0) / number,
        longest=max(dataset.lengths),
        supervised_share=supervised / tokens,
        picture_share=_many(map(truediv, dataset.pictures, dataset.lengths)),
        records=number,
        source=f"{number:,} records",
    )


def measured_lengths(recipe: Recipe, llm_folder: Path, picture_tokens: PictureTokens) -> Lengths:
    """Return the lengths of a run's records; pictures are not opened, and of many records some are encoded.

    Without data, or without a tokenizer, they are assumed.

    Raises:
        DataError: the records are there, and none can be used.
        ModelError: the template does not fit the tokenizer.
    """
    paths = [recipe.data.path] if isinstance(recipe.data.path, str) else [*recipe.data.path]
    if absent := [path for path in paths if not Path(path).expanduser().is_file()]:
        return assumed_lengths(recipe, picture_tokens, f"{absent[0]} is not there")
    try:
        tokenizer = load_tokenizer(llm_folder)
    except ModelError:
        return assumed_lengths(recipe, picture_tokens, f"{llm_folder} has no tokenizer that can be read")
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template_for(tokenizer, recipe.language_model.template)[0],
        picture_tokens=picture_tokens,
        max_tokens=recipe.data.max_tokens,
        on_long_record="truncate",
        image_token_id=image_token_id(tokenizer),
    )
    records = list(load_records(recipe.data.path, on_bad_record="skip").records)
    if recipe.data.turns == "both":
        records += [alone for record in records if len(record.turns) > 1 for alone in turns_alone(record)]
    found: list[tuple[int, int, int]] = []
    for record in records[:: max(1, -(-len(records) // SAMPLE))]:
        try:
            example = encoder.encode(record)
        except DataError:
            continue  # `dianjing check` and `train` name it; here lengths are wanted
        supervised = sum(label != IGNORE_INDEX for label in example.labels)
        found.append((len(example.input_ids), supervised, example.num_images))
    if not found:
        raise DataError(f"{paths[0]}: no record there can be used; `dianjing check {paths[0]}` says why")
    return _summed(found, len(records))


def _summed(found: Sequence[tuple[int, int, int]], records: int) -> Lengths:
    lengths, supervised, pictures = zip(*found, strict=True)
    number = len(found)
    return Lengths(
        tokens=sum(lengths) / number,
        tokens_squared=sum(length**2 for length in lengths) / number,
        supervised=sum(supervised) / number,
        pictures=sum(pictures) / number,
        longest=max(lengths),
        supervised_share=sum(supervised) / sum(lengths),
        picture_share=_many(count / length for length, _, count in found),
        records=records,
        source=f"{records:,} records" + (f", {number:,} of them measured" if number < records else ""),
    )


def _many(shares: Iterable[float]) -> float:
    ordered = sorted(shares)
    return ordered[int(MANY * (len(ordered) - 1))]
