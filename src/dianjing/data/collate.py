"""Pack -> Batch: records end to end, no padding, and never an attention_mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor

from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Example
from dianjing.pictures.image import ImageProcessor, pixel_values

ROUND = (1, 64)
"""A padded shape is a multiple of this: kernels are chosen for each new size."""
FULL_ENOUGH = 0.75
"""Share of padded attention that must not be padding: its kernels take 0.65 of the others' time (one H200)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The records of one pack, flat.

    Two records of 3 and 2 tokens, labels [-, 7, 8] and [-, 9]: position_ids [0, 1, 2, 0, 1],
    cu_seqlens [0, 3, 5], target_rows [0, 1, 3], targets [7, 8, 9].
    """

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    """Restart with each record."""
    cu_seqlens: Int32[Tensor, " documents_and_one"]
    """Where each record begins, and the end of the last."""
    max_seqlen: int
    padded_shape: tuple[int, int] | None
    """Documents and the length they are padded to (layers/padded.py), if attention is faster so."""
    pixels: UInt8[Tensor, "images 3 height width"]
    """Pictures as bytes: a quarter of what the tower reads, which is made where the tower is."""
    pixel_table: Float[Tensor, "3 256"]
    image_positions: Int[Tensor, " image_tokens"]
    """Rows of the image tokens, in the order of the pictures."""
    target_rows: Int[Tensor, " supervised"]
    """Rows whose next token is supervised."""
    targets: Int[Tensor, " supervised"]
    """That next token."""
    pictures: tuple[int, ...]
    """Pictures of each record."""
    ids: tuple[str, ...]

    @classmethod
    def empty(cls, image_processor: ImageProcessor) -> Batch:
        """Return a pack of two tokens that belong to no record, the second of them supervised."""
        example = Example(
            id="",
            input_ids=[0, 0],
            labels=[IGNORE_INDEX, 0],
            images=(),
            num_images=0,
            image_lengths=(),
            truncated=0,
            source="",
            index=0,
        )
        batch = collate([example], [], image_token_id=-1, image_processor=image_processor)
        return replace(batch, pictures=(), ids=())

    def select(self, records: Sequence[int]) -> Batch:
        """Return the batch of some of the records, by their numbers in this one."""
        starts: list[int] = cast(Any, self.cu_seqlens).tolist()
        lengths = [starts[number + 1] - starts[number] for number in records]
        rows = torch.cat([torch.arange(starts[number], starts[number + 1]) for number in records])
        place = torch.full((self.num_tokens,), -1).index_copy(0, rows, torch.arange(len(rows)))
        image_rows = place[self.image_positions].sort().values
        target_rows, order = place[self.target_rows].sort()
        ends = [0, *accumulate(self.pictures)]
        pictures = [picture for number in records for picture in range(ends[number], ends[number + 1])]
        return replace(
            self,
            input_ids=self.input_ids[rows],
            position_ids=self.position_ids[rows],
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            max_seqlen=max(lengths),
            padded_shape=padded_shape_of(lengths),
            pixels=self.pixels[torch.tensor(pictures, dtype=torch.int64)],
            image_positions=image_rows[image_rows >= 0],
            target_rows=target_rows[target_rows >= 0],
            targets=self.targets[order[target_rows >= 0]],
            pictures=tuple(self.pictures[number] for number in records),
            ids=tuple(self.ids[number] for number in records),
        )

    @property
    def num_tokens(self) -> int:
        """Positions in the pack, pictures expanded."""
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        """Pictures in the pack."""
        return len(self.pixels)

    @property
    def pixel_values(self) -> Float[Tensor, "images 3 height width"]:
        """The input of the vision tower, computed again each time."""
        return pixel_values(self.pixels, self.pixel_table)

    @property
    def num_supervised(self) -> int:
        """Tokens the loss is a sum over."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; from pinned memory the copy does not stop the program."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def pin_memory(self) -> Batch:
        """Return the batch in memory that a GPU can read by itself (the DataLoader asks for it)."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def padded_shape_of(lengths: Sequence[int]) -> tuple[int, int] | None:
    """Return the padded shape for documents of these lengths; None if too much of it would be padding."""
    sides = zip((len(lengths), max(lengths)), ROUND, strict=True)
    documents, longest = (-(-number // side) * side for number, side in sides)
    full = sum(length * length for length in lengths) / (documents * longest * longest)
    return (documents, longest) if full >= FULL_ENOUGH else None


def collate(
    examples: Sequence[Example],
    pixels: Sequence[UInt8[Tensor, "3 height width"]],
    *,
    image_token_id: int,
    image_processor: ImageProcessor,
) -> Batch:
    """Join examples and their pictures (all examples', in order, from `image_processor.pixels`) to one batch."""
    images = sum(example.num_images for example in examples)
    assert images == len(pixels), f"{images} pictures in the records, {len(pixels)} given"
    nothing = torch.zeros(0, 3, image_processor.size, image_processor.size, dtype=torch.uint8)
    lengths = [len(example.input_ids) for example in examples]
    input_ids = torch.tensor([token for example in examples for token in example.input_ids])
    # The first token of a record follows nothing: it is not a target.
    labels = torch.tensor([label for example in examples for label in [IGNORE_INDEX, *example.labels[1:]]])
    supervised = (labels != IGNORE_INDEX).nonzero()[:, 0]
    return Batch(
        input_ids=input_ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        padded_shape=padded_shape_of(lengths),
        pixels=torch.stack(list(pixels)) if pixels else nothing,
        pixel_table=image_processor.table(),
        image_positions=(input_ids == image_token_id).nonzero()[:, 0],
        target_rows=supervised - 1,
        targets=labels[supervised],
        pictures=tuple(example.num_images for example in examples),
        ids=tuple(example.id for example in examples),
    )
