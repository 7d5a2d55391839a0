"""Kinds of projectors, by the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dianjing.errors import ModelError
from dianjing.export.refusals import refusals
from dianjing.model.build import build
from dianjing.model.pixel_shuffle import PixelShuffleProjector
from dianjing.model.projector import KINDS, kind_of
from dianjing.model.weights import load_projector
from dianjing.plan.weights import weights_of_recipe
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare
from tests.tiny import write_clip


def test_pixel_shuffle_joins_squares(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", image_size=56)  # 4 by 4 patches
    recipe = make_recipe(projector={"kind": "pixel_shuffle"}, vision_tower={"folder": str(folder)})
    model, dataset = prepare(recipe)
    projector = model.model.multi_modal_projector
    assert isinstance(projector, PixelShuffleProjector)
    assert kind_of(projector) is KINDS["pixel_shuffle"]
    assert dataset.encoder.picture_tokens() == 4
    features = torch.randn(2, 16, 24)
    squares = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    for number, square in enumerate(squares):
        joined = features[:, square].flatten(1)
        alone = projector.linear_2(torch.nn.functional.gelu(projector.linear_1(joined)))
        torch.testing.assert_close(projector(features)[:, number], alone)
    _, gradients = outcome(model, [dataset.batch([0, 4])])
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    shapes = weights_of_recipe(recipe).shapes
    assert (shapes.patches, shapes.image_tokens, shapes.positions) == (16, 4, 17)


def test_what_cannot_hold_it_says_so(make_recipe: MakeRecipe) -> None:
    reasons = refusals(make_recipe(projector={"kind": "pixel_shuffle"}))
    assert reasons.keys() == {"hf", "llava", "xtuner", "gguf"}
    assert 'a projector of the kind "pixel_shuffle"' in reasons["hf"]
    assert not refusals(make_recipe())


def test_a_grid_of_odd_sides_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", image_size=42)
    with pytest.raises(ModelError, match="3 by 3 features, which squares of 2 by 2 do not fill"):
        build(make_recipe(projector={"kind": "pixel_shuffle"}, vision_tower={"folder": str(folder)}))


def test_a_projector_of_another_program_is_of_another_kind(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build(make_recipe(projector={"kind": "pixel_shuffle"})).model
    path = tmp_path / "mm_projector.bin"
    torch.save({f"model.mm_projector.{number}.weight": torch.zeros(2, 2) for number in (0, 2)}, path)
    with pytest.raises(ModelError, match="XTuner and LLaVA have no projector of two linear layers with biases on"):
        load_projector(model, path)
