from __future__ import annotations

import torch

from dianjing.data.order import epoch_order, run_indices, step_indices, steps_per_epoch


def test_shuffling_is_mmengines() -> None:
    for seed, epoch in ((0, 0), (3, 2)):
        expected = torch.randperm(10, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        assert epoch_order(10, seed, epoch, "shuffle") == expected
    assert epoch_order(10, 0, 0, "shuffle") != epoch_order(10, 0, 1, "shuffle")


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
                first_step=first,
                last_step=last,
            )
        )

    whole = steps(0, 7)
    assert [len(step) for step in whole] == [2, 2, 1, 2, 2, 1, 2]
    assert [index for step in whole[:3] for index in step] == epoch_order(5, 1, 0, "shuffle")
    assert [index for step in whole[3:6] for index in step] == epoch_order(5, 1, 1, "shuffle")
    assert steps(4, 7) == whole[4:]
    ranks = [steps(0, 7, rank, 2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(step) for step in whole]
