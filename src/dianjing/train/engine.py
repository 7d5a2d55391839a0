"""Engine `ddp`, which takes optimizer steps; the base of the other engines.

A step is the same with each engine: the packs' shares of the loss are summed over all ranks, the gradient is clipped by
its norm, AdamW steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.data.collate import Batch
from dianjing.model.forward import forward_loss
from dianjing.model.weights import trainable_state
from dianjing.train.optim import load_optimizer_state, make_optimizer, optimizer_state


class StepOutcome(NamedTuple):
    """Result of a step, which is not taken if a number is not finite."""

    loss: float
    norm: float
    """Of the gradients, before they were clipped; nan where the loss alone was enough to know."""
    learns: bool
    """The gradient of the module `probe` is not zero."""

    @property
    def finite(self) -> bool:
        """The step was taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class PendingOutcome:
    """Numbers of a step on their way from the device; work queued after them is not waited for."""

    def __init__(self, loss: Tensor, norm: Tensor, probe: Tensor) -> None:
        """`probe` is not 0 if the probed module has a gradient."""
        numbers = torch.stack([value.to(loss.device, torch.float32) for value in (loss, norm, probe)])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event() if loss.is_cuda else None
        if self._there:
            self._there.record()

    def wait(self) -> StepOutcome:
        """Wait for the numbers."""
        if self._there:
            self._there.synchronize()
        loss, norm, probe = self._numbers.tolist()
        return StepOutcome(loss, norm, probe != 0)


class Losses(nn.Module):
    """The loss as a module: distributed training hooks into a module's call."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch; of one without records, a zero that depends on all that trains."""
        loss = forward_loss(self.model, batch)
        return loss if batch.ids else loss * 0


class Engine:
    """`ddp`, and what the other engines have in common with it."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, model: LlavaForConditionalGeneration) -> None:
        self._accelerator = accelerator
        self._model = model
        self._clip_norm = recipe.train.clip_norm
        self._distribute(recipe, Losses(model))

    def _distribute(self, recipe: Recipe, losses: nn.Module) -> None:
        self.optimizer = make_optimizer(self._model, recipe)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # it stays for now
            self._losses: Any = self._accelerator.prepare_model(losses)

    def num_packs(self, own: int) -> int:
        """Return how many packs this rank must run in a step of which `own` are its own."""
        return max(own, 1)

    def backward(self, batch: Batch, tokens: int, *, last: bool) -> Tensor:
        """Add the gradient of a pack's share in the mean over a step's tokens; return the share.

        `last` says that it is the step's last pack on this rank.
        """
        # Gradients are averaged over the ranks, hence the factor.
        with nullcontext() if last else self._accelerator.no_sync(self._losses):
            share = self._losses(batch) / tokens
            self._accelerator.backward(share * self._accelerator.num_processes)
        return share.detach()

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of a batch, without a gradient; called on all ranks, each with the same batch."""
        return self._losses(batch)

    def step(self, loss: Tensor, probe: nn.Module | None = None) -> StepOutcome:
        """Clip, and take the step unless its loss or the norm of its gradient is not finite.

        All of it is queued on a GPU before anything is waited for: the optimizer itself checks `found_inf`. The result
        says if the module `probe` has a gradient.
        """
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm = self._norm(trained)
        probe_norm = torch.ones(()) if probe is None else self._norm(probe.parameters())
        read = PendingOutcome(loss, norm, probe_norm)
        clip_grads_with_norm_(trained, self._clip_norm or math.inf, norm)
        # Fused AdamW changes nothing where this is not 0; the name is that of torch.amp's contract with optimizers.
        self.optimizer.found_inf = (~(loss.isfinite() & norm.isfinite())).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        count_change(self._model)
        return read.wait()

    def weights(self) -> Mapping[str, Tensor]:
        """Return what trains, whole, by name; called on all ranks, of use on the main one."""
        return trainable_state(self._model)

    def optimizer_state(self) -> Mapping[str, Tensor]:
        """Return the optimizer state, whole, as "<parameter>/exp_avg" and so on; called like `weights`."""
        return optimizer_state(self.optimizer)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `optimizer_state` returned, on any number of ranks and with any engine."""
        load_optimizer_state(self.optimizer, state)

    def _norm(self, weights: Iterable[nn.Parameter]) -> Tensor:
        return get_total_norm([weight.grad for weight in weights if weight.grad is not None])


def count_change(model: nn.Module) -> None:
    """Let torch count a change of what trains: fused layers keep copies of it in bf16 (layers/fused/adapters.py).

    Neither the fused step of torch's optimizer nor DeepSpeed's says so by itself.
    """
    increment_version([weight for weight in model.parameters() if weight.requires_grad])
