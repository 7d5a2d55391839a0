from __future__ import annotations

from typing import Any

import pytest
import torch

from dianjing.constants import IGNORE_INDEX
from dianjing.data.collate import Batch, collate
from dianjing.data.encode import Example
from dianjing.pictures.image import ImageProcessor

IMAGE = 99
NO = IGNORE_INDEX


def example(name: str, input_ids: list[int], labels: list[int], images: int = 0) -> Example:
    return Example(
        id=name,
        input_ids=input_ids,
        labels=labels,
        images=tuple(f"{i}.png" for i in range(images)),
        num_images=images,
        image_lengths=(),
        truncated=0,
        source="data.json",
        index=0,
    )


def processor(size: int) -> ImageProcessor:
    """Return one that leaves the value of a byte as it is."""
    return ImageProcessor(
        size=size, crop=False, resample=3, rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), aspect="crop"
    )


@pytest.fixture
def batch() -> Batch:
    examples = [
        example("a", [1, IMAGE, IMAGE, 5, 6], [NO, NO, NO, 5, 6], images=1),
        example("b", [1, 7, 8], [NO, 7, NO]),
        example("c", [3, IMAGE, IMAGE, IMAGE, IMAGE, 9], [3, NO, NO, NO, NO, 9], images=2),
    ]
    pictures = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(3)]
    return collate(examples, pictures, image_token_id=IMAGE, image_processor=processor(2))


def test_records_lie_end_to_end(batch: Batch) -> None:
    assert batch.input_ids.tolist() == [1, IMAGE, IMAGE, 5, 6, 1, 7, 8, 3, IMAGE, IMAGE, IMAGE, IMAGE, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 14]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_tokens, batch.ids) == (6, 14, ("a", "b", "c"))


def test_a_target_is_the_next_token_of_the_same_record(batch: Batch) -> None:
    assert batch.target_rows.tolist() == [2, 3, 5, 12]
    assert batch.targets.tolist() == [5, 6, 7, 9]  # 3 begins its record: nothing stands before it
    assert batch.num_supervised == 4
    assert batch.input_ids[batch.target_rows + 1].equal(batch.targets)


def test_pictures_are_in_the_order_of_their_tokens(batch: Batch) -> None:
    assert batch.image_positions.tolist() == [1, 2, 9, 10, 11, 12]
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_a_pack_without_pictures() -> None:
    batch = collate([example("a", [1, 2], [NO, 2])], [], image_token_id=IMAGE, image_processor=processor(4))
    assert batch.pixel_values.shape == (0, 3, 4, 4)
    assert batch.image_positions.tolist() == []


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([600, 598, 604], (3, 640)),
        ([600, 340, 604, 601], None),
        ([600, 540, 604, 601], (4, 640)),
        ([600, 20, 30, 25], None),
        ([64, 64], (2, 64)),
    ],
)
def test_only_documents_of_nearly_one_length_are_padded(lengths: list[int], expected: Any) -> None:
    examples = [example(str(number), [1] * length, [1] * length) for number, length in enumerate(lengths)]
    assert collate(examples, [], image_token_id=IMAGE, image_processor=processor(2)).padded_shape == expected


def test_a_picture_too_few_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="1 pictures in the records, 0 given"):
        collate([example("a", [1, IMAGE], [NO, 2], images=1)], [], image_token_id=IMAGE, image_processor=processor(4))


def test_to_moves_every_tensor(batch: Batch) -> None:
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(tensor.is_meta for tensor in tensors)
    assert moved.ids == batch.ids


def test_selected_records_are_what_they_are_alone(batch: Batch) -> None:
    """Pictures of records have unlike numbers of tokens, and records may come in another order."""
    found = batch.select([2, 0])
    assert found.input_ids.tolist() == [3, IMAGE, IMAGE, IMAGE, IMAGE, 9, 1, IMAGE, IMAGE, 5, 6]
    assert found.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert (found.cu_seqlens.tolist(), found.max_seqlen) == ([0, 6, 11], 6)
    assert found.pixel_values[:, 0, 0, 0].tolist() == [1, 2, 0]
    assert found.image_positions.tolist() == [1, 2, 3, 4, 7, 8]
    assert (found.target_rows.tolist(), found.targets.tolist()) == ([4, 8, 9], [9, 5, 6])
    assert (found.pictures, found.ids) == ((2, 1), ("c", "a"))
    assert batch.select([1]).num_images == 0
    for name, value in vars(batch.select([0, 1, 2])).items():
        assert value.equal(getattr(batch, name)) if isinstance(value, torch.Tensor) else value == getattr(batch, name)


def test_an_empty_pack_belongs_to_no_record(batch: Batch) -> None:
    empty = Batch.empty(processor(2))
    assert (empty.ids, empty.pictures, empty.num_images, empty.num_supervised, empty.num_tokens) == ((), (), 0, 1, 2)
    assert (empty.target_rows.tolist(), empty.image_positions.tolist()) == ([0], [])
    for name, value in vars(empty).items():
        assert not isinstance(value, torch.Tensor) or value.dtype == getattr(batch, name).dtype, name
