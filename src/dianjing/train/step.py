"""One optimizer step: packs -> gradients, summed over packs and ranks -> new weights."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.config.steps import steps_per_epoch
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset
from dianjing.train.engine import Engine
from dianjing.train.log import StepResult
from dianjing.train.memory import WithinMemory
from dianjing.train.optim import learning_rate_factor, set_learning_rates
from dianjing.train.probe import Probes
from dianjing.train.silent_failures import SilentFailures


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All that takes a step."""

    recipe: Recipe
    accelerator: Accelerator
    model: LlavaForConditionalGeneration
    engine: Engine
    dataset: Dataset
    silent_failures: SilentFailures
    probes: Probes
    within_memory: WithinMemory


def take_step(parts: Parts, step: int, total_steps: int, batches: Sequence[Batch], data_wait: float) -> StepResult:
    """Take one optimizer step, `step` counted from 1, on this rank's packs of it."""
    began = time.perf_counter()
    recipe, engine = parts.recipe, parts.engine
    set_learning_rates(engine.optimizer, learning_rate_factor(step - 1, total_steps, recipe.train.warmup_ratio))
    tokens, pictures = over_ranks(
        parts.accelerator,
        sum(batch.num_supervised for batch in batches),
        sum(batch.num_images for batch in batches),
    )
    parts.silent_failures.supervised(int(tokens), step)

    def attempt(packs: Sequence[Batch]) -> Tensor:
        torch.manual_seed(_seed_of(recipe.seed, step, parts.accelerator.process_index))
        return backward(parts, packs, int(tokens))

    batches, losses = parts.within_memory.run(step, batches, attempt)
    loss = parts.accelerator.reduce(losses.sum(), "sum")
    assert isinstance(loss, Tensor)
    outcome = engine.step(loss, parts.model.model.multi_modal_projector if pictures else None)
    if not outcome.finite:
        suspects = gather_object(_suspects(batches, losses.tolist()))
        raise parts.silent_failures.not_finite(outcome.loss, outcome.norm, step, suspects)
    if pictures:
        parts.silent_failures.sight(outcome.learns, step)
    records = parts.dataset.num_records
    epoch, place = divmod(step - 1, steps_per_epoch(records, recipe.train.global_batch_size))
    seen = min((place + 1) * recipe.train.global_batch_size, records)
    return StepResult(
        step=step,
        epoch=epoch + seen / records,
        loss=outcome.loss,
        learning_rate=engine.optimizer.param_groups[-1]["lr"],
        grad_norm=outcome.norm,
        records=seen - place * recipe.train.global_batch_size,
        supervised_tokens=int(tokens),
        seconds=data_wait + time.perf_counter() - began,
        data_wait=data_wait,
        notes=tuple(parts.within_memory.notes),
    )


def backward(parts: Parts, batches: Sequence[Batch], tokens: int) -> Float[Tensor, " packs"]:
    """Leave the gradient of the mean loss over the step's tokens; return each pack's share of that mean.

    Ranks may have different numbers of packs; if the engine needs equal numbers, empty packs fill them up.
    """
    device = parts.accelerator.device
    missing = parts.engine.num_packs(len(batches)) - len(batches)
    processor = parts.dataset.image_processor
    assert processor, "a data set that is trained on has an image processor"
    packs = [*batches, *(Batch.empty(processor) for _ in range(missing))]
    shares = [
        parts.engine.backward(batch.to(device), tokens, last=number == len(packs))
        for number, batch in enumerate(packs, start=1)
    ]
    return torch.stack(shares)


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
