"""The inputs of a demo: a text LLM, data for both stages, held-out questions, further figures to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dianjing.eval.evaluate import Report
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question

Measure = Callable[[LoadedModel, Report], float]
"""Of a stage's model, and of its answers to the held-out questions."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of each stage besides those of the held-out questions."""

    name: str
    """In results.json."""
    label: str
    label_zh: str
    measure: Measure | None = None
    """None: the scored questions have it under this name."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A demo's models, data and figures."""

    title: str
    note: str
    """The comparison, with its limits."""
    note_zh: str
    language_model: str
    """As a recipe names it."""
    recipes: Mapping[str, str | Path]
    """Of the stages, by name or path."""
    settings: Mapping[str, Mapping[str, object]]
    """Fields of each stage's recipe that are set for this world and this machine."""
    images: Path
    held_out_path: Path
    held_out: tuple[Question, ...]
    types: tuple[str, ...]
    """Of the held-out questions, in the order of the report."""
    max_new_tokens: int
    figures: tuple[Figure, ...] = field(default=())
    ceiling: Callable[[LoadedModel], float] | None = None
    """Accuracy of the text LLM when it is told in words what it would see: no eyes can do better."""
