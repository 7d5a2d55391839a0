"""Models, packs, and the comparison that all equalities of the forward pass rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.constants import IGNORE_INDEX
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.model.build import build
from dianjing.model.forward import forward_loss
from dianjing.model.stage import apply_stage

Outcome = tuple[Tensor, dict[str, Tensor]]
"""A summed loss and the gradient of each parameter that trains."""


def prepare(recipe: Recipe, device: str = "cpu") -> tuple[LlavaForConditionalGeneration, Dataset]:
    """Return a model as a stage leaves it, its adapters moved off zero, and the data it would train on."""
    built = build(recipe, torch.device(device))
    apply_stage(built.model, recipe)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in built.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return built.model.train(), open_dataset(recipe.data, built.encoder, built.image_processor)


def outcome(model: LlavaForConditionalGeneration, batches: Sequence[Batch]) -> Outcome:
    """Return what training gets from some packs."""
    model.zero_grad()
    losses = [forward_loss(model, batch) for batch in batches]
    loss = torch.stack(losses).sum()
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return a copy of each gradient."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_same(one: Outcome, other: Outcome, rounding: float = 1.0) -> None:
    """Compare losses and gradients to what fp32 sums in another order can give; `rounding` times that, where the
    sums are longer."""
    torch.testing.assert_close(one[0], other[0], rtol=2e-6, atol=0)
    assert one[1].keys() == other[1].keys()
    # Some gradients are zero but for rounding (a bias of keys moves no softmax), hence the share of the largest.
    largest = max(float(gradient.abs().max()) for gradient in one[1].values())
    for name, gradient in one[1].items():
        close = rounding * (2e-5 * float(gradient.abs().max()) + 2e-7 * largest)
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=close, msg=f"gradient of {name}")


def upstream(model: Any, batch: Batch) -> Outcome:
    """Return what transformers' own LLaVA makes of the same records, padded to one rectangle with labels.

    Changes the model for good: transformers wants the id of a picture to be one of the vocabulary.
    """
    model.set_attn_implementation("sdpa")
    model.config.image_token_id = 0
    assert 0 not in batch.input_ids
    flat = batch.input_ids.index_fill(0, batch.image_positions, 0)
    labels = torch.full_like(flat, IGNORE_INDEX).index_copy(0, batch.target_rows + 1, batch.targets)
    sizes = batch.cu_seqlens.diff().tolist()
    rows = [torch.ones(size, dtype=torch.long) for size in sizes]
    model.zero_grad()
    loss = (
        batch.num_supervised
        * model(
            input_ids=pad_sequence(flat.split(sizes), batch_first=True, padding_value=1),
            attention_mask=pad_sequence(rows, batch_first=True),
            labels=pad_sequence(labels.split(sizes), batch_first=True, padding_value=IGNORE_INDEX),
            pixel_values=batch.pixel_values,
            use_cache=False,
        ).loss
    )
    loss.backward()
    return loss.detach(), gradients(model)
