"""Scenes and their splits: what is held out stays out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dianjing.tinyworld.render import IMAGE_SIZE, RGB, render
from dianjing.tinyworld.scene import COLOURS, HELD_OUT_PAIRS, PLACES, SHAPES, Thing, allowed_pairs, sample_distinct


def test_the_splits_share_no_pair_and_leave_none_out() -> None:
    train, held_out, every = (set(allowed_pairs(name)) for name in ("train", "held_out", "any"))
    assert held_out == HELD_OUT_PAIRS
    assert not train & held_out
    assert train | held_out == every
    assert len(every) == len(COLOURS) * len(SHAPES)


def test_every_colour_and_shape_is_drawn_in_training() -> None:
    train = allowed_pairs("train")
    assert {colour for colour, _ in train} == set(COLOURS)
    assert {shape for _, shape in train} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_scenes_keep_to_their_pairs_and_places(split: str) -> None:
    scenes = sample_distinct(random.Random(3), 300, split)  # type: ignore[arg-type]
    assert len(set(scenes)) == 300
    for scene in scenes:
        assert {(thing.colour, thing.shape) for thing in scene} <= set(allowed_pairs(split))  # type: ignore[arg-type]
        places = [thing.place for thing in scene]
        assert places == sorted(set(places))
        assert set(places) <= set(range(PLACES))


def test_a_scene_that_is_known_is_not_drawn_again() -> None:
    known = set(sample_distinct(random.Random(0), 400, "train"))
    # The same stream of scenes again, so each of them would come back.
    assert not known & set(sample_distinct(random.Random(0), 400, "train", without=known))


def test_the_picture_shows_each_object_in_its_cell() -> None:
    scene = (Thing(0, "large", "red", "square"), Thing(8, "large", "blue", "circle"))
    pixels = np.asarray(render(scene, seed=5)).astype(int)
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    for (row, column), colour in (((16, 16), "red"), ((80, 80), "blue")):
        assert np.abs(pixels[row, column] - RGB[colour]).max() < 30
    assert np.abs(pixels[48, 48] - RGB["red"]).max() > 60


def test_a_seed_is_a_picture() -> None:
    scene = (Thing(4, "small", "green", "star"),)
    same, again, other = (np.asarray(render(scene, seed)) for seed in (1, 1, 2))
    assert (same == again).all()
    assert (same != other).any()
