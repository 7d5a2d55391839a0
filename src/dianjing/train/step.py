"""One optimizer step: packs -> gradients, summed over packs and ranks -> new weights."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset
from dianjing.data.order import steps_per_epoch
from dianjing.model.forward import forward_loss
from dianjing.train.log import StepResult
from dianjing.train.optim import learning_rate_factor, set_learning_rates
from dianjing.train.watch import Watch


class Losses(nn.Module):
    """The loss as a module: distributed training hooks into a module's call."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch | None) -> Tensor:
        """Return the summed loss of a batch; None, for a rank without records, is a zero with gradients."""
        if batch is not None:
            return forward_loss(self.model, batch)
        trained = (weight for weight in self.parameters() if weight.requires_grad)
        return torch.stack([weight.sum() * 0 for weight in trained]).sum()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that takes a step."""

    recipe: Recipe
    accelerator: Accelerator
    model: LlavaForConditionalGeneration
    losses: nn.Module
    optimizer: Optimizer
    dataset: Dataset
    watch: Watch


def take_step(parts: Parts, step: int, total_steps: int, batches: Sequence[Batch], data_wait: float) -> StepResult:
    """Take one optimizer step, `step` counted from 1, on this rank's packs of it."""
    began = time.perf_counter()
    recipe, watch, optimizer = parts.recipe, parts.watch, parts.optimizer
    torch.manual_seed(_seed_of(recipe.seed, step, parts.accelerator.process_index))
    set_learning_rates(optimizer, learning_rate_factor(step - 1, total_steps, recipe.train.warmup_ratio))
    tokens, pictures = over_ranks(
        parts.accelerator,
        sum(batch.num_supervised for batch in batches),
        sum(batch.num_images for batch in batches),
    )
    watch.supervised(int(tokens), step)
    losses = backward(parts, batches, int(tokens))
    (loss,) = over_ranks(parts.accelerator, sum(losses))
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, recipe.train.clip_norm or math.inf).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise watch.not_finite(loss, norm, step, gather_object(_suspects(batches, losses)))
    watch.sight(int(pictures), step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    records = parts.dataset.num_records
    epoch, place = divmod(step - 1, steps_per_epoch(records, recipe.train.global_batch_size))
    seen = min((place + 1) * recipe.train.global_batch_size, records)
    return StepResult(
        step=step,
        epoch=epoch + seen / records,
        loss=loss,
        learning_rate=optimizer.param_groups[-1]["lr"],
        grad_norm=norm,
        records=seen - place * recipe.train.global_batch_size,
        supervised_tokens=int(tokens),
        seconds=data_wait + time.perf_counter() - began,
        data_wait=data_wait,
    )


def backward(parts: Parts, batches: Sequence[Batch], tokens: int) -> list[float]:
    """Leave the gradient of the mean loss over the step's tokens; return each pack's share of that mean.

    Ranks may have unlike numbers of packs: each sums its own and meets the others in its last one, where
    their gradients are averaged, hence the factor.
    """
    device = parts.accelerator.device
    shares: list[Tensor] = []
    packs = [*batches] or [None]
    for number, batch in enumerate(packs, start=1):
        meeting = nullcontext() if number == len(packs) else parts.accelerator.no_sync(parts.losses)
        with meeting:
            share = parts.losses(None if batch is None else batch.to(device)) / tokens
            parts.accelerator.backward(share * parts.accelerator.num_processes)
        shares.append(share.detach())
    return torch.stack(shares).tolist()


def over_ranks(accelerator: Accelerator, *values: float) -> list[float]:
    """Return sums over all ranks."""
    if accelerator.num_processes == 1:
        return list(values)
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.tolist()


def _seed_of(seed: int, step: int, rank: int) -> int:
    """Return the seed of a step's dropout: a function of where the run is, so that no state of it is kept."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7])


def _suspects(batches: Sequence[Batch], losses: Sequence[float]) -> list[str]:
    """Return the records of the packs whose loss is not finite, or of all packs when each is."""
    bad = [batch for batch, loss in zip(batches, losses, strict=False) if not math.isfinite(loss)]
    return [name for batch in bad or batches for name in batch.ids]
