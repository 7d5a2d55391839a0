"""The lines of train.jsonl -> loss.svg: loss over steps, with the learning rate below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

LEFT, WIDTH = 70, 620
PANELS = (
    ("loss", "loss per supervised token", "#1f77b4", 20, 280),
    ("learning_rate", "learning rate", "#ff7f0e", 330, 90),
)
"""Metric, its name in words, colour, top edge and height of each panel, in pixels."""


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the curve; a value that is not finite leaves a gap."""
    steps = [float(row["step"]) for row in rows]
    across = ticks(steps)
    to_x = _scale(across, LEFT, LEFT + WIDTH)
    panels = []
    for metric, label, colour, top, height in PANELS:
        values = [float(row[metric]) for row in rows]
        marks = ticks(values)
        to_y = _scale(marks, top + height, top)
        pieces = [""]
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):
                pieces[-1] += f"{to_x(step):.1f},{to_y(value):.1f} "
            elif pieces[-1]:
                pieces.append("")
        grid = [(to_y(mark), f"{mark:g}") for mark in marks]
        panels.append({"label": label, "colour": colour, "top": top, "height": height, "grid": grid, "lines": pieces})
    template = jinja2.Template(files("dianjing.train").joinpath("loss.svg.j2").read_text(encoding="utf-8"))
    marks = [(to_x(mark), f"{mark:g}") for mark in across]
    path.write_text(template.render(panels=panels, marks=marks, left=LEFT, width=WIDTH), encoding="utf-8")


def ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers at even distances that enclose all finite values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    distance = next(part * power for part in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (part * power) <= 9)
    first, last = math.floor(low / distance), math.ceil(high / distance)
    return [index * distance for index in range(first, max(last, first + 1) + 1)]


def _scale(marks: Sequence[float], start: float, end: float) -> Any:
    """Return the function that puts the first mark at `start` and the last at `end`."""
    return lambda value: start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)
