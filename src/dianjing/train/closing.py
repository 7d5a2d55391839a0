"""The last words of a run: how far the loss fell, and whether more steps would have helped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dianjing.language import counted, say

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
        return say("done")
    steps, seconds = rows[-1]["step"], seconds_until(rows)
    shape, advice = _shape(losses)
    line = say(
        "done: {steps}, loss {first:.3g} -> {last:.3g}{shape}{took}",
        steps=counted(steps, "{number:,} step", "{number:,} steps"),
        first=losses[0],
        last=_last(losses),
        shape=shape,
        took=say(", {time}", time=_in_words(seconds)) if seconds else "",
    )
    return "\n".join([line, advice] if advice else [line])


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
        more = say("more steps (train.epochs) or a higher train.learning_rate would teach it more")
        return say(" and hardly moved"), more
    if last > first:
        return say(" and rising"), say("a lower train.learning_rate may keep the loss from rising")
    part = len(losses) // PARTS
    before, end = losses[-2 * part : -part], losses[-part:]
    if _mean(before) - _mean(end) > FALLING * _mean(end):
        return say(" and still falling"), say("more steps (train.epochs) would teach it more")
    return "", ""


def _last(losses: Sequence[float]) -> float:
    return _mean(losses[-max(len(losses) // (2 * PARTS), 1) :])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _in_words(seconds: float) -> str:
    if seconds < 100:
        return say("{number:.0f} s", number=seconds)
    return (
        say("{number:.0f} min", number=seconds / 60) if seconds < 6000 else say("{number:.1f} h", number=seconds / 3600)
    )
