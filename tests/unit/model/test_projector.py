"""Kinds of projectors, by the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dianjing.errors import ModelError
from dianjing.export.export import export
from dianjing.export.refusals import refusals
from dianjing.infer.load import load_for_use
from dianjing.model.build import build
from dianjing.model.pixel_shuffle import PixelShuffleProjector
from dianjing.model.projector import KINDS, kind_of
from dianjing.model.weights import load_projector
from dianjing.plan.weights import weights_of_recipe
from dianjing.train.loop import train
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


@pytest.mark.parametrize("kind", ["pixel_shuffle", "linear"])
def test_what_cannot_hold_it_says_so(make_recipe: MakeRecipe, kind: str) -> None:
    reasons = refusals(make_recipe(projector={"kind": kind}))
    assert reasons.keys() == {"hf", "llava", "xtuner", "gguf"}
    assert f'a projector of the kind "{kind}"' in reasons["hf"]
    assert not refusals(make_recipe())


def test_a_linear_projector_trains_exports_and_is_loaded_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(projector={"kind": "linear"}, train={"max_steps": 2, "global_batch_size": 4})
    run = train(recipe, quiet=True)
    loaded = load_for_use(str(run), "cpu")
    weights = loaded.model.model.multi_modal_projector.state_dict()
    assert {name: weight.shape for name, weight in weights.items()} == {
        "linear_1.weight": (32, 24),
        "linear_1.bias": (32,),
    }
    features = torch.randn(1, 4, 24)
    by_hand = features @ weights["linear_1.weight"].T + weights["linear_1.bias"]
    torch.testing.assert_close(loaded.model.model.multi_modal_projector(features), by_hand)
    export(loaded, tmp_path / "adapter", format="adapter")
    other = build(replace(recipe, seed=3)).model
    load_projector(other, run)
    assert all(torch.equal(w, weights[n]) for n, w in other.model.multi_modal_projector.state_dict().items())
    with pytest.raises(ModelError, match="its projector is not two linear layers with biases: linear_2"):
        load_projector(build(make_recipe()).model, run)
    narrow = write_clip(tmp_path / "narrow", hidden_size=16)
    other = build(replace(recipe, vision_tower=replace(recipe.vision_tower, folder=str(narrow)))).model
    with pytest.raises(ModelError, match="goes 24 -> 32, here 16 -> 32 is needed"):
        load_projector(other, run)


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
