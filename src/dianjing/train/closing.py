"""The last words of a run: how far the loss fell, and whether more steps would have helped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PARTS = 5
"""The loss of the last of these parts of a run is compared with that of the one before."""
FEWEST_ROWS = 10
"""Of train.jsonl, to say more than the first and the last loss."""
MOVED = 0.02
"""Of the first loss: a smaller change is none."""
FALLING = 0.05
"""Of the loss: with so much less than before it was still falling."""


def closing(rows: Sequence[dict[str, Any]]) -> str:
    """Return how a run went by the rows of its train.jsonl, and what to do if it was too short."""
    losses = [float(row["loss"]) for row in rows]
    if not losses:
        return "done"
    steps, seconds = rows[-1]["step"], seconds_until(rows)
    took = f", {_in_words(seconds)}" if seconds else ""
    shape, advice = _shape(losses)
    fell = f"loss {losses[0]:.3g} -> {_last(losses):.3g}{shape}"
    return f"done: {steps:,} step{'s' * (steps > 1)}, {fell}{took}{advice}"


def seconds_until(rows: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of training until the last row; 0 of an older version's, which did not count them."""
    seconds = rows[-1].get("seconds") if rows else None
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _shape(losses: Sequence[float]) -> tuple[str, str]:
    """Return how the loss moved at the end, and what follows from it."""
    first, last = losses[0], _last(losses)
    if len(losses) < FEWEST_ROWS:
        return "", ""
    if abs(last - first) < MOVED * first:
        return " and hardly moved", "\nmore steps (train.epochs) or a higher train.learning_rate would teach it more"
    if last > first:
        return " and rising", "\na lower train.learning_rate may keep the loss from rising"
    part = len(losses) // PARTS
    before, end = losses[-2 * part : -part], losses[-part:]
    if _mean(before) - _mean(end) > FALLING * _mean(end):
        return " and still falling", "\nmore steps (train.epochs) would teach it more"
    return "", ""


def _last(losses: Sequence[float]) -> float:
    return _mean(losses[-max(len(losses) // (2 * PARTS), 1) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
