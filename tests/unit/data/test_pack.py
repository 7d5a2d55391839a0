from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.data.pack import pack

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


def test_the_documented_examples() -> None:
    assert pack([3, 6, 4, 2], 8) == [[1, 3], [0, 2]]
    assert pack([3, 5, 3, 5, 2, 3], 12) == [[1, 3], [0, 2, 4, 5]]


def test_an_item_goes_where_it_fits_best() -> None:
    # 8 and 7 leave room for 2 and 3; the longest first, one after the other, would take three packs.
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]


def test_packs_are_even_where_they_can_be() -> None:
    assert pack([5] * 10, 48) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_nothing_to_pack() -> None:
    assert pack([], 8) == []


def test_an_item_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 has 9 tokens, more than a pack of 8"):
        pack([1, 9], 8)


@given(LENGTHS, st.integers(30, 60))
def test_each_item_once_and_no_pack_too_long(lengths: list[int], pack_tokens: int) -> None:
    packs = pack(lengths, pack_tokens)
    assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
    assert all(members for members in packs)
    assert all(sum(lengths[i] for i in members) <= pack_tokens for members in packs)


@given(LENGTHS, st.integers(30, 60))
def test_like_lengths_stand_together_as_evenly_as_they_can(lengths: list[int], pack_tokens: int) -> None:
    packs = pack(lengths, pack_tokens)
    ordered = sorted(lengths, reverse=True)
    # Every way to cut the lengths, longest first, into as many parts: the best of them, if one fits.
    longest = min(
        (
            max(sum(ordered[a:b]) for a, b in zip((0, *cuts), (*cuts, len(ordered)), strict=True))
            for cuts in combinations(range(1, len(ordered)), len(packs) - 1)
        ),
        default=0,
    )
    if longest <= pack_tokens:
        assert max((sum(lengths[i] for i in members) for members in packs), default=0) == longest
        ends = [sorted(lengths[i] for i in members) for members in packs]
        assert all(one[0] >= other[-1] for one, other in pairwise(ends))
