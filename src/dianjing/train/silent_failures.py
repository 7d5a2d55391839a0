"""Stops for runs that would learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dianjing.errors import TrainError
from dianjing.model.stage import part_of

BLIND_STEPS = 3
"""Steps with pictures in a row, in which the projector may get no gradient at all."""
NAMES_SHOWN = 8
STILL_STEPS = 10
"""Steps after which some weight of each part that trains must have another value."""
WATCHED = 64
"""Numbers of each weight that are compared."""


class SilentFailures:
    """Stops a run that learns nothing; each step is checked."""

    def __init__(self) -> None:
        self._blind_steps = 0
        self.steps_with_pictures = 0

    def supervised(self, tokens: int, step: int) -> None:
        """Raise TrainError if a step has no supervised token."""
        if not tokens:
            raise TrainError(f"step {step}: none of its tokens are supervised; run `dianjing show` on the data")

    def not_finite(self, loss: float, norm: float, step: int, ids: Sequence[str]) -> TrainError:
        """Return the error of a step whose loss or gradient is not finite; `ids` are the suspected records."""
        more = f" and {len(ids) - NAMES_SHOWN} more" if len(ids) > NAMES_SHOWN else ""
        return TrainError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}; the step was not taken and no checkpoint "
            f"written. Records: {', '.join(ids[:NAMES_SHOWN])}{more}. Look at them with `dianjing show`, or lower the "
            "learning rate; --resume goes on from the last checkpoint"
        )

    def sight(self, learns: bool, step: int) -> None:
        """Raise TrainError if the projector got no gradient in several steps with pictures."""
        self.steps_with_pictures += 1
        self._blind_steps = 0 if learns else self._blind_steps + 1
        if self._blind_steps == BLIND_STEPS:
            raise TrainError(
                f"step {step}: for {BLIND_STEPS} steps with pictures the projector got no gradient: the pictures do "
                "not reach the loss; check vision_tower.feature_layer, and the records with `dianjing show`"
            )


class WeightWatch:
    """Compares some numbers of each part that trains with what they were before the first step."""

    def __init__(self, model: nn.Module, rates: Mapping[str, float]) -> None:
        """`rates`: the highest learning rate of each part; those at 0 are not watched."""
        trained = {part_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
        self._model = model
        self._rates = {part: rate for part, rate in rates.items() if rate and part in trained}
        self._before = self._numbers()

    def require_movement(self, step: int, pictures: bool, over_ranks: Callable[..., list[float]]) -> None:
        """Refuse weights that do not move; called on all ranks. Without `pictures` only the LLM can have moved.

        Raises:
            TrainError: of a part, no number has changed on any rank.
        """
        now = self._numbers()
        moved = {part: not all(map(torch.equal, before, now[part])) for part, before in self._before.items()}
        parts = [part for part in self._rates if pictures or part == "language_model"]
        ranks = over_ranks(*(moved[part] for part in parts))
        if still := [part for part, number in zip(parts, ranks, strict=True) if not number]:
            rates = ", ".join(f"{part} at a rate of {self._rates[part]:g}" for part in still)
            raise TrainError(
                f"step {step}: weights that train are what they were before the first step: {rates}; the rate is too "
                "small for fp32, or no gradient reaches them"
            )

    def _numbers(self) -> dict[str, list[Tensor]]:
        """Return copies of the first numbers of each weight that trains, by part."""
        found: dict[str, list[Tensor]] = {part: [] for part in self._rates}
        for name, weight in self._model.named_parameters():
            if weight.requires_grad and (part := part_of(name)) in found:
                local = getattr(weight, "to_local", lambda weight=weight: weight)()  # a shard of it
                found[part].append(local.detach().flatten()[:WATCHED].clone())
        return found
