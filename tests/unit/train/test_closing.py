"""The last words of a run, by curves whose shape is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from dianjing.train.closing import closing

SHAPES: dict[str, Callable[[float], float]] = {
    "and still falling": lambda part: 7 - 3 * part,
    "and hardly moved": lambda part: 6.9 + 0.05 * math.sin(20 * part),
    "and rising": lambda part: 2 + part,
}


def rows(loss: Callable[[float], float], number: int, seconds: float = 540.0) -> list[dict[str, object]]:
    parts = [index / (number - 1) for index in range(number)]
    return [{"step": round(144 * p), "loss": loss(p), "learning_rate": 1.0, "seconds": seconds * p} for p in parts]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_said_with_what_to_do(shape: str) -> None:
    first, advice = closing(rows(SHAPES[shape], 36)).split("\n")
    assert first.startswith("done: 144 steps, loss ")
    assert f" {shape}, 9 min" in first
    assert "train." in advice


def test_a_curve_that_has_come_down_needs_no_advice() -> None:
    assert closing(rows(lambda part: 1 + 6 * math.exp(-20 * part), 36)) == "done: 144 steps, loss 7 -> 1, 9 min"


@pytest.mark.parametrize("shape", SHAPES)
def test_of_a_few_rows_no_shape_is_said(shape: str) -> None:
    assert " and " not in closing(rows(SHAPES[shape], 5))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "-> 4"), (50.0, ", 50 s"), (540.0, ", 9 min"), (9000.0, ", 2.5 h")]
)
def test_how_long_it_took(seconds: float, words: str) -> None:
    assert closing(rows(lambda part: 7 - 3 * part, 5, seconds)).endswith(words)


def test_runs_without_rows_and_of_one_step() -> None:
    assert closing([]) == "done"
    assert closing([{"step": 1, "loss": 11.8}]) == "done: 1 step, loss 11.8 -> 11.8"
