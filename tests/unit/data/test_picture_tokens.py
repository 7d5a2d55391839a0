"""How many tokens pictures have, asked by everything that counts positions."""

from __future__ import annotations

import pytest

from dianjing.data.picture_tokens import FixedCount, Size, expand
from tests.xtuner import make_encoder, small_tokenizer


def test_a_fixed_count_does_not_depend_on_the_size() -> None:
    assert [FixedCount(7)(size) for size in (None, (1, 2), (9000, 3))] == [7, 7, 7]


def test_each_picture_is_expanded_to_its_own_count() -> None:
    assert expand([1, 9, 2, 9], [1, 0, 2, 5], 9, [2, 3]) == [1, 0, 0, 2, 5, 5, 5]


def test_the_encoder_asks_for_each_picture_by_its_size() -> None:
    def tokens(size: Size | None = None) -> int:
        return sum(size) if size else 1

    encoder = make_encoder(small_tokenizer("tiny_llama_spm"), "vicuna", num_image_tokens=1)
    free = make_encoder(small_tokenizer("tiny_llama_spm"), "vicuna", picture_tokens=tokens)
    question = "Is <image> as wide as <image>?"
    plain, pictures = encoder.prompt([], question)
    assert pictures == plain.count(encoder.image_token_id) == 2
    for sizes, counts in ((((2, 1), (3, 4)), [3, 7]), (((2, 1),), [3, 1]), ((), [1, 1])):
        ids, _ = free.prompt([], question, sizes)
        assert ids == expand(plain, plain, encoder.image_token_id, counts)


def test_a_picture_too_many_is_our_fault() -> None:
    with pytest.raises(StopIteration):
        expand([9, 9], [9, 9], 9, [1])
