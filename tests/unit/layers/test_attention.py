"""Packed attention against plain attention over each document."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.layers.attention import packed_attention, padded_attention
from dianjing.layers.padded import padded_layout

LENGTHS = [5, 1, 9, 3]
MODULE: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def states(heads: int = 4, kv_heads: int = 2, size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, count, sum(LENGTHS), size, requires_grad=True) for count in (heads, kv_heads, kv_heads)]


def spans() -> dict[str, Any]:
    return {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(), "max_seqlen": max(LENGTHS)}


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with a mask written out: the same document, and not later."""
    documents = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    visible = (documents[:, None] == documents) & torch.ones(len(documents), len(documents)).tril().bool()
    key, value = (rows.repeat_interleave(2, dim=1) for rows in (key, value))
    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def test_it_is_attention_within_each_document() -> None:
    expected = by_hand(*(ours := states()))
    output, _ = packed_attention(MODULE, *ours, None, scaling=8**-0.5, **spans())
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), ours)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), ours))


@pytest.mark.parametrize("shape", [(4, 9), (6, 16)])
def test_padded_it_is_the_same(shape: tuple[int, int]) -> None:
    expected = by_hand(*(ours := states()))
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])
    output = padded_attention(*ours, padded_layout(spans()["cu_seqlens"], position_ids, shape), 8**-0.5)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), ours)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), ours))


def test_a_document_alone_has_the_same_bits() -> None:
    ours = states()
    output, _ = packed_attention(MODULE, *ours, None, **spans())
    begin, end = 6, 15
    alone = [rows[:, :, begin:end] for rows in ours]
    span = {"cu_seqlens": torch.tensor([0, end - begin]).int(), "max_seqlen": end - begin}
    assert torch.equal(packed_attention(MODULE, *alone, None, **span)[0], output[:, begin:end])


def test_without_documents_it_obeys_the_mask() -> None:
    ours = states()
    seen = torch.zeros(1, 1, 18, 18, dtype=torch.bool)
    seen[..., 0] = True
    output, _ = packed_attention(MODULE, *ours, seen)
    first = ours[2][:, :, :1].repeat_interleave(2, dim=1).transpose(1, 2)
    torch.testing.assert_close(output, first.expand_as(output))


@pytest.mark.parametrize("settings", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_other_kinds_of_attention_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="not supported"):
        packed_attention(MODULE, *states(), None, **spans(), **settings)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_hides_what_lies_further_back(window: int) -> None:
    query, key, value = states()
    bounds = spans()["cu_seqlens"].tolist()
    document = torch.bucketize(torch.arange(18), torch.tensor(bounds[1:]), right=True)
    distance = torch.arange(18)[:, None] - torch.arange(18)
    seen = (document[:, None] == document) & (distance >= 0) & (distance < window)
    expected, _ = packed_attention(MODULE, query, key, value, seen[None, None])
    output, _ = packed_attention(MODULE, query, key, value, None, **spans(), sliding_window=window)
    torch.testing.assert_close(output, expected)


def test_a_window_wider_than_each_record_is_no_window() -> None:
    ours = states()
    assert torch.equal(
        packed_attention(MODULE, *ours, None, **spans(), sliding_window=9)[0],
        packed_attention(MODULE, *ours, None, **spans())[0],
    )
