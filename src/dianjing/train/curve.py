"""The lines of train.jsonl -> loss.svg: loss over steps, with the learning rate below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from dianjing.train.probe import HELD_OUT, RIGHT, TRAIN, probes_of, sight_gap

LEFT, WIDTH = 70, 620
PANELS = (
    ("loss", "loss per supervised token", "#1f77b4", 20, 280),
    ("learning_rate", "learning rate", "#ff7f0e", 330, 90),
    ("sight_gap", "sight gap", "#2ca02c", 450, 90),
)
"""Metric, its name in words, colour, top edge and height of each panel, in pixels; the last only with probes."""
HELD_OUT_COLOUR = "#9467bd"


def draw_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the curve; a value that is not finite leaves a gap. Held-out losses and gaps are drawn in violet."""
    probes = probes_of(rows)
    across = ticks([*(float(row["step"]) for row in rows), *(float(probe["step"]) for probe in probes)])
    to_x = _scale(across, LEFT, LEFT + WIDTH)
    panels = []
    for metric, label, colour, top, height in PANELS if probes else PANELS[:2]:
        lines = _lines(metric, colour, rows, probes)
        marks = ticks([value for _, points in lines for _, value in points])
        to_y = _scale(marks, top + height, top)
        grid = [(to_y(mark), f"{mark:g}") for mark in marks]
        pieces = [(drawn, piece) for drawn, points in lines for piece in _pieces(points, to_x, to_y)]
        panels.append({"label": label, "top": top, "height": height, "grid": grid, "lines": pieces})
    template = jinja2.Template(files("dianjing.train").joinpath("loss.svg.j2").read_text(encoding="utf-8"))
    marks = [(to_x(mark), f"{mark:g}") for mark in across]
    bottom = panels[-1]["top"] + panels[-1]["height"]
    path.write_text(
        template.render(panels=panels, marks=marks, left=LEFT, width=WIDTH, bottom=bottom), encoding="utf-8"
    )


def _lines(
    metric: str, colour: str, rows: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]]
) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return colour and points (step, value) of each line of a panel."""
    if metric == "sight_gap":
        return [
            (drawn, [(float(probe["step"]), gap) for probe, gap in gaps])
            for name, drawn in ((TRAIN, colour), (HELD_OUT, HELD_OUT_COLOUR))
            if (gaps := [(probe, gap) for probe in probes if (gap := sight_gap(probe.get(name, {}))) is not None])
        ]
    lines = [(colour, [(float(row["step"]), float(row[metric])) for row in rows])]
    held_out = [(float(probe["step"]), float(probe[HELD_OUT][RIGHT])) for probe in probes if HELD_OUT in probe]
    return [*lines, (HELD_OUT_COLOUR, held_out)] if metric == "loss" and held_out else lines


def _pieces(points: Sequence[tuple[float, float]], to_x: Any, to_y: Any) -> list[str]:
    pieces = [""]
    for step, value in points:
        if math.isfinite(value):
            pieces[-1] += f"{to_x(step):.1f},{to_y(value):.1f} "
        elif pieces[-1]:
            pieces.append("")
    return pieces


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
