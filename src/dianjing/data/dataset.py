"""Joins the other files of this folder: a data set that is checked at the door, and batches of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dianjing.config.schema import DataConfig
from dianjing.data.cache import cached_survey
from dianjing.data.encode import Encoder, Example
from dianjing.data.pack import pack
from dianjing.data.picture_tokens import Size
from dianjing.data.record import Record
from dianjing.data.source import Records, open_files
from dianjing.data.survey import image_folder, naming
from dianjing.data.workers import from_workers
from dianjing.errors import DataError
from dianjing.language import say
from dianjing.pictures.picture import load_image
from dianjing.progress import Watch

if TYPE_CHECKING:  # slow to import, and records can be looked at without
    from jaxtyping import UInt8
    from torch import Tensor

    from dianjing.data.collate import Batch
    from dianjing.pictures.image import ImageProcessor

CACHE_BYTES = 512 * 2**20
"""Memory for pictures that are used again, in each process."""


@dataclass(kw_only=True)
class Dataset:
    """Records that can all be used, and what is known about them before the first is trained on."""

    config: DataConfig
    encoder: Encoder
    image_processor: ImageProcessor | None
    """None: the records can be looked at, but no batch can be made."""
    records: Records
    lengths: tuple[int, ...]
    """Positions of each record, pictures expanded."""
    pictures: tuple[int, ...]
    """Pictures of each record."""
    modality_lengths: tuple[int, ...]
    """Tokens of each record, a picture counted as one; negative for a record without pictures (XTuner's)."""
    report: dict[str, int]
    """Kind of finding -> how often, for printing."""
    skipped: tuple[str, ...]
    """One message a record that was left out."""
    fingerprint: str
    """Changes with any id, label, picture name or picture file's size."""
    different_pictures: int = 0
    opened: str = ""
    """A line about the cache, for printing."""

    def __post_init__(self) -> None:
        side = self.image_processor.size if self.image_processor else 1
        self._pixels = lru_cache(maxsize=CACHE_BYTES // (3 * side * side))(self._read_picture)

    @property
    def num_records(self) -> int:
        """How many records an epoch shows."""
        return len(self.records)

    @property
    def counts(self) -> str:
        """Counts of what the set holds, in one line; a picture in several records is one."""
        numbers = {**self.report, "pictures": self.different_pictures}
        shown = {name: number for name, number in numbers.items() if number}
        return say(", ").join(
            say("{number:,} {name}", number=number, name=say(name if number > 1 else name.removesuffix("s")))
            for name, number in shown.items()
        )

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
        batch = self.batch_of([self.records[i] for i in indices])
        lengths = [int(length) for length in batch.cu_seqlens.diff()]
        assert lengths == [self.lengths[i] for i in indices], f"{batch.ids[0]}: read otherwise than at the door"
        return batch

    def batch_of(self, records: Sequence[Record]) -> Batch:
        """Return the batch of any records whose pictures lie where those of the data set do.

        Raises:
            DataError: a picture is broken, or no longer there.
        """
        from dianjing.data.collate import collate

        assert self.image_processor, "a data set without an image processor makes no batches"
        pixels: list[UInt8[Tensor, "3 height width"]] = []
        examples: list[Example] = []
        for record in records:
            folder = image_folder(self.config, record.source)
            with naming(record):
                pictures = [self._pixels(folder, name) for name in record.images]
            pixels += [picture for picture, _ in pictures]
            examples.append(self.encoder.encode(record, [size for _, size in pictures]))
        return collate(
            examples,
            pixels,
            image_token_id=self.encoder.image_token_id,
            image_processor=self.image_processor,
        )

    def _read_picture(self, folder: str, name: str) -> tuple[UInt8[Tensor, "3 height width"], Size]:
        assert self.image_processor
        image = load_image(folder, name, self.image_processor.rule)
        return self.image_processor.pixels(image), (image.height, image.width)


def open_dataset(
    config: DataConfig,
    encoder: Encoder,
    image_processor: ImageProcessor | None,
    watch: Watch = lambda doing, done, total: None,
) -> Dataset:
    """Read every record, look at every picture and encode everything once; a later start knows it from the cache.

    Raises:
        DataError: a file cannot be read; or some records cannot be used, all named in one error, unless
            on_bad_record and, for the long ones, on_long_record have them skipped.
    """
    files = open_files(config)
    found, opened = cached_survey(files, config, encoder, watch)
    tokens, images = found.rows["tokens"], found.rows["images"]
    return Dataset(
        config=config,
        encoder=encoder,
        image_processor=image_processor,
        records=Records(files, found.rows),
        lengths=tuple(found.rows["positions"].tolist()),
        pictures=tuple(images.tolist()),
        modality_lengths=tuple(np.where(images > 0, tokens, -tokens).tolist()),
        report=found.report,
        skipped=found.skipped,
        fingerprint=found.fingerprint,
        different_pictures=len(found.pictures.names),
        opened=opened,
    )


class _Packs:
    """Batches by the records that are in them (no records: None), for the DataLoader's processes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, members: Sequence[int]) -> Batch | DataError | None:
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
        TrainError: a worker was killed, or hangs.
    """
    from torch.utils.data import DataLoader

    from dianjing.data.collate import Batch

    sizes: deque[int] = deque()

    def packs() -> Iterator[list[int]]:
        for indices in plan:
            members = dataset.packs(indices) or [[]]  # a rank may have no record in a step
            sizes.append(len(members))
            yield from members

    batches = iter(
        DataLoader(cast(Any, _Packs(dataset)), batch_size=None, sampler=packs(), num_workers=workers, pin_memory=pinned)
    )
    batches = from_workers(batches) if workers else batches
    for first in batches:
        made = [first, *islice(batches, sizes.popleft() - 1)]
        for batch in made:
            if isinstance(batch, DataError):
                raise batch
        yield [batch for batch in made if isinstance(batch, Batch)]
