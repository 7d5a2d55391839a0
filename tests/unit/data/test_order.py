from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dianjing.config.steps import steps_per_epoch
from dianjing.data.order import epoch_order, run_indices, step_indices
from tests.xtuner import XTUNER

ORDERS: dict[str, list[int]] = json.loads((XTUNER / "tiny" / "orders.json").read_text(encoding="utf-8"))
"""Of the 160 records of two real runs of XTuner, batch 2, seed 0."""
MERGED = (77, 47, 47, 75, 43, 43, 77, 47, 47, 75, 43, 43, 77, 47, 47, 75)
"""Positions of those records, which repeat every sixteen; a picture has 16."""
TEXT_ONLY = (5, 11)


def test_shuffling_is_mmengines() -> None:
    for seed, epoch in ((0, 0), (3, 2)):
        expected = torch.randperm(10, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        assert epoch_order(10, seed, epoch, "shuffle") == expected
    assert epoch_order(10, 0, 0, "shuffle") != epoch_order(10, 0, 1, "shuffle")


def test_a_real_run_of_xtuner_had_this_shuffling() -> None:
    assert epoch_order(160, 0, 0, "shuffle") == ORDERS["pretrain"]


def test_a_real_run_of_xtuner_had_this_order_by_length() -> None:
    lengths = [-size if kind in TEXT_ONLY else size - 15 for kind, size in enumerate(MERGED)] * 10
    assert epoch_order(160, 0, 0, "length_grouped", lengths=lengths, global_batch_size=2) == ORDERS["finetune"]


def in_words(lengths: list[int], batch: int, seed: int) -> list[int]:
    """Follow what is known of XTuner's LengthGroupedSampler, sentence by sentence."""
    # The generator is seeded with seed + epoch.
    generator = torch.Generator()
    generator.manual_seed(seed)
    # mega_batch_mult = min(N // (total_batch * 4), 50), at least 1; group = mult * total_batch.
    mega_batch_mult = len(lengths) // (batch * 4)
    if mega_batch_mult > 50:
        mega_batch_mult = 50
    if mega_batch_mult == 0:
        mega_batch_mult = 1
    group = mega_batch_mult * batch

    def cut_and_sort(members: list[int], keys: dict[int, int]) -> list[list[int]]:
        permuted = [members[position] for position in torch.randperm(len(members), generator=generator).tolist()]
        groups = []
        while permuted:
            groups.append(sorted(permuted[:group], key=lambda index: -keys[index]))
            permuted = permuted[group:]
        return groups

    signed = dict(enumerate(lengths))
    size = {index: abs(length) for index, length in signed.items()}
    pictured, text = [i for i in signed if signed[i] > 0], [i for i in signed if signed[i] < 0]
    if not pictured or not text:  # one modality: by the signed length
        groups = cut_and_sort(list(signed), signed)
    else:
        first, second = cut_and_sort(pictured, size), cut_and_sort(text, size)
        # The last groups of both are joined into one; the others are shuffled; the joined one comes last, sorted.
        joined = sorted(first.pop() + second.pop(), key=lambda index: -size[index])
        others = first + second
        groups = [others[position] for position in torch.randperm(len(others), generator=generator).tolist()]
        groups.append(joined)
    # The head of the group with the longest head changes places with the very first index.
    heads = [size[members[0]] for members in groups]
    longest = heads.index(max(heads))
    swapped = groups[longest][0]
    groups[longest][0] = groups[0][0]
    groups[0][0] = swapped
    return [index for members in groups for index in members]


LENGTHS = st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=90)


@given(lengths=LENGTHS, batch=st.integers(1, 7), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_the_order_by_length_is_the_described_one(lengths: list[int], batch: int, seed: int, epoch: int) -> None:
    order = epoch_order(len(lengths), seed, epoch, "length_grouped", lengths=lengths, global_batch_size=batch)
    assert order == in_words(lengths, batch, seed + epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert abs(lengths[order[0]]) == max(map(abs, lengths)) or all(length < 0 for length in lengths)


def test_neighbours_are_alike() -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [int(n) * (1 if n % 3 else -1) for n in torch.randint(1, 500, (400,), generator=generator)]

    def jumps(mode: str) -> int:
        order = epoch_order(400, 0, 0, mode, lengths=lengths, global_batch_size=8)  # type: ignore[arg-type]
        return sum(abs(abs(lengths[a]) - abs(lengths[b])) for a, b in pairwise(order))

    assert jumps("length_grouped") < jumps("shuffle") / 10


def test_ranks_share_the_order_by_length() -> None:
    lengths = [5, -3, 9, -2, 7, 7, -8, 1]

    def steps(rank: int, world_size: int) -> list[list[int]]:
        return list(
            run_indices(
                8,
                seed=0,
                mode="length_grouped",
                lengths=lengths,
                global_batch_size=4,
                rank=rank,
                world_size=world_size,
                steps=range(0, 4),
            )
        )

    for whole, first, second in zip(steps(0, 1), steps(0, 2), steps(1, 2), strict=True):
        assert not set(first) & set(second)
        assert sorted(first + second) == sorted(whole)
    with pytest.raises(AssertionError, match="needs the lengths"):
        epoch_order(8, 0, 0, "length_grouped")


def test_order_leaves_torchs_own_generator_alone() -> None:
    state = torch.get_rng_state()
    epoch_order(10, 0, 0, "shuffle")
    assert torch.equal(state, torch.get_rng_state())


def test_sequential() -> None:
    assert epoch_order(4, seed=7, epoch=3, mode="sequential") == [0, 1, 2, 3]


def test_the_documented_example() -> None:
    assert [step_indices([4, 2, 0, 3, 1], 1, 3, rank, 2) for rank in (0, 1)] == [[3], [1]]
    assert steps_per_epoch(5, 3) == 2


def test_a_run_shows_each_record_once_an_epoch_and_ends_where_it_is_told() -> None:
    def steps(first: int, last: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        return list(
            run_indices(
                5,
                seed=1,
                mode="shuffle",
                global_batch_size=2,
                rank=rank,
                world_size=world_size,
                steps=range(first, last),
            )
        )

    whole = steps(0, 7)
    assert [len(step) for step in whole] == [2, 2, 1, 2, 2, 1, 2]
    assert [index for step in whole[:3] for index in step] == epoch_order(5, 1, 0, "shuffle")
    assert [index for step in whole[3:6] for index in step] == epoch_order(5, 1, 1, "shuffle")
    assert steps(4, 7) == whole[4:]
    ranks = [steps(0, 7, rank, 2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(step) for step in whole]
