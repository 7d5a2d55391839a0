"""Draw a scene as a 96 x 96 picture."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image, ImageDraw

from dianjing.tinyworld.scene import GRID, Scene, Thing

IMAGE_SIZE = 96
CELL = IMAGE_SIZE // GRID
RADIUS = {"small": 7.0, "large": 13.0}
"""In pixels, before jitter."""
JITTER = 2.0
TURN_DEGREES = 8.0
SUPERSAMPLE = 4

RGB = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 20),
    "black": (20, 20, 22),
    "white": (250, 250, 250),
}
UNNAMED = ""
"""A colour or a shape that no word of the world names: a random colour far from the named ones, a random blob."""
BACKGROUNDS = (
    (150, 160, 172),
    (172, 160, 148),
    (150, 172, 156),
    (160, 152, 176),
    (140, 140, 140),
    (176, 168, 160),
)


def _rotate(x: float, y: float, degrees: float) -> tuple[float, float]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * c - y * s, x * s + y * c


def _polygon(angles_and_radii: list[tuple[float, float]], turn: float) -> list[tuple[float, float]]:
    return [_rotate(radius, 0.0, angle + turn) for angle, radius in angles_and_radii]


def _unnamed_colour(rng: random.Random) -> tuple[int, int, int]:
    while True:
        r, g, b = (rng.randint(0, 255) for _ in range(3))
        if all(math.dist((r, g, b), known) > 70 for known in (*RGB.values(), *BACKGROUNDS)):
            return r, g, b


def _outline(shape: str, turn: float, rng: random.Random) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 around the origin."""
    if shape == UNNAMED:
        return _polygon([(52 * k, rng.uniform(0.45, 1.2)) for k in range(7)], turn)
    if shape == "square":
        return _polygon([(45 + 90 * k, 1.15) for k in range(4)], turn)
    if shape == "diamond":
        return _polygon([(90 * k, 1.15 if k % 2 else 0.75) for k in range(4)], turn)
    if shape == "triangle":
        return _polygon([(-90 + 120 * k, 1.15) for k in range(3)], turn)
    if shape == "star":
        return _polygon([(-90 + 36 * k, 0.45 if k % 2 else 1.15) for k in range(10)], turn)
    arm = 0.36  # the cross: three corners a quarter, turned four times
    quarter = [(1.0, arm), (arm, arm), (arm, 1.0)]
    corners = [_rotate(x, y, 90 * k) for k in range(4) for x, y in quarter]
    return [_rotate(x, y, turn) for x, y in corners]


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = RADIUS[thing.size] * rng.uniform(0.93, 1.07)
    x = (thing.column + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
    y = (thing.row + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
    base = _unnamed_colour(rng) if thing.colour == UNNAMED else RGB[thing.colour]
    colour = tuple(min(255, max(0, c + rng.randint(-10, 10))) for c in base)
    k = SUPERSAMPLE
    if thing.shape in ("circle", "ring"):
        box = [(x - radius) * k, (y - radius) * k, (x + radius) * k, (y + radius) * k]
        if thing.shape == "circle":
            draw.ellipse(box, fill=colour)
        else:
            draw.ellipse(box, outline=colour, width=round(radius * k * 0.36))
        return
    turn = rng.uniform(-TURN_DEGREES, TURN_DEGREES)
    draw.polygon(
        [((x + px * radius) * k, (y + py * radius) * k) for px, py in _outline(thing.shape, turn, rng)],
        fill=colour,
    )


def render(scene: Scene, seed: int) -> Image.Image:
    """Draw `scene` as an RGB picture; `seed` decides background, jitter, tilt and noise."""
    rng = random.Random(seed)
    base = rng.choice(BACKGROUNDS)
    big = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLE, IMAGE_SIZE * SUPERSAMPLE), base)
    draw = ImageDraw.Draw(big)
    for thing in scene:
        _draw_thing(draw, thing, rng)
    pixels = np.asarray(big.reduce(SUPERSAMPLE), dtype=np.float32)
    slope = np.linspace(-rng.uniform(0, 8), rng.uniform(0, 8), IMAGE_SIZE, dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 2.5, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + slope[:, None, None] + noise, 0, 255).astype(np.uint8))
