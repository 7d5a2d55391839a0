"""Joins the other files of this folder: a data set that is checked at the door, and batches of it."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dianjing.config.schema import DataConfig
from dianjing.constants import IGNORE_INDEX
from dianjing.data.collate import Batch, collate
from dianjing.data.encode import Encoder, Example, LongRecordError
from dianjing.data.image import ImageProcessor, check_image, load_image
from dianjing.data.pack import pack
from dianjing.data.record import Record, bad_records, load_records, turns_alone
from dianjing.errors import DataError

CACHE_BYTES = 512 * 2**20
"""Memory for pictures that are used again, in each process."""


@dataclass(kw_only=True)
class Dataset:
    """Records that can all be used, and what is known about them before the first is trained on."""

    config: DataConfig
    encoder: Encoder
    image_processor: ImageProcessor | None
    """None: the records can be looked at, but no batch can be made."""
    records: tuple[Record, ...]
    lengths: tuple[int, ...]
    """Positions of each record, pictures expanded."""
    modality_lengths: tuple[int, ...]
    """Tokens of each record, a picture counted as one; negative for a record without pictures (XTuner's)."""
    report: dict[str, int]
    """What was found -> how often, for printing."""
    skipped: tuple[str, ...]
    """One message a record that was left out."""
    fingerprint: str
    """Changes with any id, label, picture name or picture file's size."""

    def __post_init__(self) -> None:
        side = self.image_processor.size if self.image_processor else 1
        self._pixels = lru_cache(maxsize=CACHE_BYTES // (3 * side * side))(self._read_picture)

    @property
    def num_records(self) -> int:
        """How many records an epoch shows."""
        return len(self.records)

    def example(self, index: int) -> Example:
        """Return a record as the model reads it; encoded each time, which costs less than keeping it."""
        return self.encoder.encode(self.records[index])

    def packs(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the records of a step as packs of at most config.pack_tokens positions."""
        packs = pack([self.lengths[i] for i in indices], self.config.pack_tokens)
        return [[indices[i] for i in members] for members in packs]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the batch of one pack.

        Raises:
            DataError: a picture is broken, or no longer there.
        """
        assert self.image_processor, "a data set without an image processor makes no batches"
        pixels: list[UInt8[Tensor, "3 height width"]] = []
        for record in (self.records[i] for i in indices):
            with _naming(record):
                folder = image_folder(self.config, record)
                pixels += [self._pixels(folder, name) for name in record.images]
        return collate(
            [self.example(i) for i in indices],
            pixels,
            image_token_id=self.encoder.image_token_id,
            image_processor=self.image_processor,
        )

    def _read_picture(self, folder: str, name: str) -> UInt8[Tensor, "3 height width"]:
        assert self.image_processor
        return self.image_processor.pixels(load_image(folder, name))


def open_dataset(config: DataConfig, encoder: Encoder, image_processor: ImageProcessor | None) -> Dataset:
    """Read every record, look at every picture and encode everything once.

    Raises:
        DataError: a file cannot be read; or some records cannot be used, all named in one error, unless
            on_bad_record and, for the long ones, on_long_record have them skipped.
    """
    if config.images and not os.path.isdir(config.images):
        raise DataError(f"{config.images}: there is no such image folder; name it (data.images)")
    loaded = load_records(config.path, on_bad_record="skip")
    problems, too_long = list(loaded.skipped), list[str]()
    records: list[Record] = []
    lengths: list[int] = []
    modality_lengths: list[int] = []
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    file_size = lru_cache(maxsize=None)(check_image)
    for record in _with_turns_alone(loaded.records) if config.turns == "both" else loaded.records:
        try:
            example = _fitting(encoder.encode(record), config, record)
            with _naming(record):
                sizes = [file_size(image_folder(config, record), name) for name in record.images]
        except LongRecordError as error:
            too_long.append(str(error))
        except DataError as error:
            problems.append(str(error))
        else:
            records.append(record)
            lengths.append(len(example.input_ids))
            tokens = len(example.input_ids) - example.num_images * (encoder.num_image_tokens - 1)
            modality_lengths.append(tokens if record.images else -tokens)
            counts.update(_counted(record, example))
            digest.update(array("q", [*example.input_ids, *example.labels, *sizes]).tobytes())
            digest.update(repr(record.images).encode())
    refused = [*(problems if config.on_bad_record == "error" else ())]
    refused += too_long if config.on_long_record == "error" else ()
    if refused:
        raise bad_records(refused)
    skipped = (*problems, *too_long)
    if not records:
        raise DataError("\n  ".join([f"{config.path}: no record is left to use; skipped:", *skipped[:3]]))
    return Dataset(
        config=config,
        encoder=encoder,
        image_processor=image_processor,
        records=tuple(records),
        lengths=tuple(lengths),
        modality_lengths=tuple(modality_lengths),
        report={"records": len(records), **counts, "skipped": len(skipped), **loaded.notices},
        skipped=skipped,
        fingerprint=digest.hexdigest(),
    )


def _with_turns_alone(records: Sequence[Record]) -> Iterator[Record]:
    for record in records:
        yield record
        if len(record.turns) > 1:
            yield from turns_alone(record)


def image_folder(config: DataConfig, record: Record) -> str:
    """Return the folder that a record's picture paths are relative to."""
    return config.images or os.path.dirname(record.source) or "."


def _fitting(example: Example, config: DataConfig, record: Record) -> Example:
    if len(example.input_ids) > config.pack_tokens:
        raise DataError(
            f"{record.where}: {len(example.input_ids)} positions with its pictures, but data.pack_tokens is "
            f"{config.pack_tokens}; raise it, or shorten the record"
        )
    return example


def _counted(record: Record, example: Example) -> dict[str, int]:
    return {
        "pictures": len(record.images),
        "text-only": int(not record.images),
        "turns": len(record.turns),
        "positions": len(example.input_ids),
        "supervised tokens": sum(label != IGNORE_INDEX for label in example.labels),
        "truncated": int(example.truncated > 0),
    }


@contextmanager
def _naming(record: Record) -> Generator[None]:
    """Say in which record a picture could not be used."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None


class _Packs(TorchDataset[Batch | DataError | None]):
    """Batches by the records that are in them (no records: None), for the DataLoader's processes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, members: Sequence[int]) -> Batch | DataError | None:  # type: ignore[override]
        try:
            return self.dataset.batch(members) if members else None
        except DataError as error:
            # Raised in a worker, it would come out with a traceback for its message.
            return error


def step_batches(
    dataset: Dataset, plan: Iterable[Sequence[int]], workers: int, *, pinned: bool = False
) -> Iterator[list[Batch]]:
    """Yield the batches of each step of `plan` (records by index, a step each); the same for any `workers`.

    A worker makes one pack at a time and is two ahead. `pinned` puts them where a GPU reads them by itself.

    Raises:
        DataError: a picture is broken, or no longer there.
    """
    sizes: deque[int] = deque()

    def packs() -> Iterator[list[int]]:
        for indices in plan:
            members = dataset.packs(indices) or [[]]  # a rank may have no record in a step
            sizes.append(len(members))
            yield from members

    batches = iter(
        DataLoader(_Packs(dataset), batch_size=None, sampler=packs(), num_workers=workers, pin_memory=pinned)
    )
    for first in batches:
        made = [first, *islice(batches, sizes.popleft() - 1)]
        for batch in made:
            if isinstance(batch, DataError):
                raise batch
        yield [batch for batch in made if isinstance(batch, Batch)]
