"""Scenes: one to four objects on a three-by-three grid, and which of them may be drawn for training."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
SIZES = ("small", "large")
GRID = 3
PLACES = GRID * GRID
MAX_OBJECTS = 4

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "cross"),
        ("yellow", "diamond"),
        ("purple", "triangle"),
        ("orange", "square"),
        ("black", "circle"),
    }
)
"""Colour and shape pairs that no training picture ever shows, so that seeing them needs composition."""

Pairs = Literal["any", "train", "held_out"]


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One object; `place` counts the cells row by row from the top left, 0 to 8."""

    place: int
    size: str
    colour: str
    shape: str

    @property
    def row(self) -> int:
        """Row of the grid, 0 at the top."""
        return self.place // GRID

    @property
    def column(self) -> int:
        """Column of the grid, 0 at the left."""
        return self.place % GRID


Scene = tuple[Thing, ...]
"""Objects in row-major order; no two share a cell or a colour-shape pair."""


def allowed_pairs(pairs: Pairs) -> list[tuple[str, str]]:
    """Return the colour-shape pairs of one split."""
    every = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if pairs == "any":
        return every
    return [pair for pair in every if (pair in HELD_OUT_PAIRS) == (pairs == "held_out")]


def sample_scene(rng: random.Random, pairs: list[tuple[str, str]]) -> Scene:
    """Draw a scene whose objects use only the given colour-shape pairs.

    Half of the scenes repeat a colour or a shape on purpose, so that counting means something.
    """
    number = rng.randint(1, MAX_OBJECTS)
    chosen = [rng.choice(pairs)]
    while len(chosen) < number:
        pool = pairs
        if rng.random() < 0.4:
            colour, shape = rng.choice(chosen)
            pool = [pair for pair in pairs if (pair[0] == colour) != (pair[1] == shape)] or pairs
        pair = rng.choice(pool)
        if pair not in chosen:
            chosen.append(pair)
    places = sorted(rng.sample(range(PLACES), number))
    rng.shuffle(chosen)
    return tuple(
        Thing(place, rng.choice(SIZES), colour, shape) for place, (colour, shape) in zip(places, chosen, strict=True)
    )


def sample_distinct(
    rng: random.Random, number: int, pairs: Pairs, without: frozenset[Scene] | set[Scene] = frozenset()
) -> list[Scene]:
    """Draw `number` different scenes, none of them in `without` (train and test never share a scene)."""
    pool, seen, scenes = allowed_pairs(pairs), set(without), []
    while len(scenes) < number:
        scene = sample_scene(rng, pool)
        if scene not in seen:
            seen.add(scene)
            scenes.append(scene)
    return scenes
