"""One question of a benchmark, with the words in which all benchmarks are described."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA 1.5's end of a question that wants a short answer."""
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA 1.5's and XTuner's end of a question with options."""
LETTER_CN = "\n请直接回答选项字母。"
"""The same in Chinese."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question, as it is asked; pictures stand in front of it."""

    id: str
    text: str
    """The whole prompt, without markers of pictures."""
    pictures: tuple[str | bytes, ...]
    """Names in the folder of pictures, or the pictures' files themselves."""
    type: str
    group: str = ""
    """Questions of one group count together; "" = alone."""
    row: Mapping[str, Any]
    """Fields of the maker's file, for scoring and for the test server."""


class Unit(NamedTuple):
    """A thing that counts once in a benchmark's mean: a question, or several that count together."""

    type: str
    value: float


class Judged(NamedTuple):
    """The worth of a set of answers."""

    units: list[Unit]
    """Their mean is the benchmark's main figure; the interval is drawn from them."""
    figures: dict[str, float]
    """By name, the main one first."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How one benchmark is read, asked and scored."""

    about: str
    """One line: the files as their maker publishes them."""
    read: Callable[[Path], list[Item]]
    """Raises DataError, which names the row."""
    judge: Callable[[Sequence[Item], Sequence[str]], Judged]
    """Of items whose reference is published, with their answers."""
    rule: str
    """How an answer is read, in words."""
    has_reference: Callable[[Item], bool] = field(default=lambda item: True)
    submission: tuple[str, Callable[[Sequence[Item], Sequence[str]], str]] | None = None
    """Name and text of the file that a test server takes."""
    max_new_tokens: int = 16


def first_groups(items: Sequence[Item], number: int) -> list[Item]:
    """Return the items of the first `number` questions, each with all that count together with it; 0 = all."""
    groups = [*dict.fromkeys(item.group or item.id for item in items)][: number or None]
    chosen = set(groups)
    return [item for item in items if (item.group or item.id) in chosen]


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def with_options(question: str, options: Mapping[str, str]) -> str:
    """Return a question with a line for each option."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in options.items())])


def by_item(value: Callable[[Item, str], float]) -> Callable[[Sequence[Item], Sequence[str]], Judged]:
    """Return how answers are judged that count one by one."""

    def judge(items: Sequence[Item], answers: Sequence[str]) -> Judged:
        units = [Unit(item.type, value(item, answer)) for item, answer in zip(items, answers, strict=True)]
        return Judged(units, {"accuracy": mean([unit.value for unit in units])})

    return judge
