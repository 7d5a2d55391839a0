"""Values of single questions -> their means with 95 % intervals, for each metric and way of asking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dianjing.eval.score import METRICS

RIGHT, OTHER_PICTURE, NO_PICTURE = "", "_other_picture", "_no_picture"
WAYS: Mapping[str, str] = {RIGHT: "right picture", OTHER_PICTURE: "other picture", NO_PICTURE: "no picture"}
"""How a question is asked: the end of a value's JSON name -> its label."""
SIGHT = "sight"
"""A metric with the right picture minus the same with another one; for the loss the other way round, so that more than
0 always means that the model looks."""
CAPTION, SAME_ANSWER = "captions", "same_answer"
HABITS: Mapping[str, str] = {CAPTION: "caption", SAME_ANSWER: "same answer"}
"""Habits that an answer may have, right or wrong: JSON name -> label."""
LOSS = "loss"
"""Of the reference answer, in nats a token."""
EXACT_SHARE = 0.05
"""Where fewer answers than this are exact, whatever picture is shown, exact match says nothing about a model."""

RESAMPLES = 1000
CHUNK = 2**22
"""Numbers drawn at a time."""


def sight_name(metric: str) -> str:
    """Return the JSON name of a metric's sight; that of the accuracy is plain "sight"."""
    return SIGHT if metric == "accuracy" else f"{metric}_{SIGHT}"


NAMES = (
    *(name for metric in (*METRICS, LOSS) for name in (*(metric + way for way in WAYS), sight_name(metric))),
    *HABITS,
)
"""The JSON name of every figure."""


class Figure(NamedTuple):
    """A mean over questions, and the interval that holds it in 95 % of resampled sets of questions.

    Where all questions have one value the interval has no width: it says nothing about questions unlike them.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One answered question: its values by JSON name; those that it cannot have are not there."""

    type: str
    values: Mapping[str, float]


def score(
    type_: str,
    reference: str,
    answers: Mapping[str, str | None],
    habits: Mapping[str, float] | None = None,
    losses: Mapping[str, float | None] | None = None,
) -> Scored:
    """Return what the answers to one question, and the losses of its reference, are worth by way of asking.

    None = it was not asked so.
    """
    values: dict[str, float] = {}
    for name, metric in METRICS.items():
        for way, answer in answers.items():
            if answer is not None:
                values[name + way] = float(metric.measure(answer, reference))
        if name + OTHER_PICTURE in values:
            values[sight_name(name)] = values[name] - values[name + OTHER_PICTURE]
    values |= {LOSS + way: loss for way, loss in (losses or {}).items() if loss is not None}
    if LOSS in values and LOSS + OTHER_PICTURE in values:
        values[sight_name(LOSS)] = values[LOSS + OTHER_PICTURE] - values[LOSS]
    return Scored(type=type_, values={**values, **(habits or {})})


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All figures of a set of questions by JSON name; one that no question has a value for is not there."""

    n: int
    figures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])

    def mean(self, name: str) -> float | None:
        """Return the mean of that JSON name; None where no question has it."""
        return self.figures[name].mean if name in self.figures else None

    @property
    def exact_says_something(self) -> bool:
        """Return whether enough answers are exact, with any picture, for exact match to tell models apart."""
        return any((self.mean(f"accuracy{way}") or 0) >= EXACT_SHARE for way in WAYS)

    def table(self) -> list[tuple[str, list[Figure | None]]]:
        """Return a row for each metric and habit: its label, and a figure for each of WAYS and for sight."""
        labels = {**{name: metric.label for name, metric in METRICS.items()}, LOSS: "loss of reference"}
        names = {
            **{label: [*(name + way for way in WAYS), sight_name(name)] for name, label in labels.items()},
            **{label: [name, "", "", ""] for name, label in HABITS.items()},
        }
        return [(label, [self.figures.get(name) for name in row]) for label, row in names.items()]

    def to_json(self) -> dict[str, Any]:
        """Return the means under their names, and the intervals under "intervals"."""
        intervals = {name: [figure.low, figure.high] for name, figure in self.figures.items()}
        return {"n": self.n, **{name: self.mean(name) for name in NAMES}, "intervals": intervals}


def summarise(scored: Sequence[Scored]) -> Summary:
    """Return the figures of at least one question."""
    columns = {name: [one.values[name] for one in scored if name in one.values] for name in NAMES}
    figures = {name: Figure(sum(column) / len(column), *interval(column)) for name, column in columns.items() if column}
    return Summary(n=len(scored), figures=figures)


def summarise_by_type(scored: Sequence[Scored]) -> dict[str, Summary]:
    """Return one summary a question type, in order of first appearance."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.type, []).append(one)
    return {name: summarise(group) for name, group in groups.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the mean over questions drawn with replacement; the same each time."""
    column, random = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    at_a_time = max(CHUNK // len(column), 1)
    means: list[Float[np.ndarray, " resamples"]] = []
    for start in range(0, RESAMPLES, at_a_time):
        drawn = random.integers(len(column), size=(min(at_a_time, RESAMPLES - start), len(column)))
        means.append(column[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
