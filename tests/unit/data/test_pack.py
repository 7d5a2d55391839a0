from __future__ import annotations

import pytest

from dianjing.data.pack import pack


def test_the_documented_example() -> None:
    assert pack([3, 6, 4, 2], 8) == [[1, 3], [0, 2]]


def test_an_item_goes_where_it_fits_best() -> None:
    assert pack([6, 5, 2], 8) == [[0, 2], [1]]


def test_nothing_to_pack() -> None:
    assert pack([], 8) == []


def test_an_item_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="item 1 has 9 tokens, more than a pack of 8"):
        pack([1, 9], 8)
