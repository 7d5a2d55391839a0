"""Stops for runs that would learn nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dianjing.errors import TrainError

BLIND_STEPS = 3
"""Steps with pictures in a row, in which the projector may get no gradient at all."""
NAMES_SHOWN = 8


class SilentFailures:
    """Stops a run that learns nothing; each step is checked."""

    def __init__(self) -> None:
        self._blind_steps = 0

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
        self._blind_steps = 0 if learns else self._blind_steps + 1
        if self._blind_steps == BLIND_STEPS:
            raise TrainError(
                f"step {step}: for {BLIND_STEPS} steps with pictures the projector got no gradient: the pictures do "
                "not reach the loss; check vision_tower.feature_layer, and the records with `dianjing show`"
            )
