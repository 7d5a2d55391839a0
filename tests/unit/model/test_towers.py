"""Each family of towers against transformers' own model and image processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from dianjing.errors import ExportError
from dianjing.export.export import export
from dianjing.export.refusals import refusals
from dianjing.infer.load import load_for_use
from dianjing.model.build import build
from dianjing.model.forward import image_features
from dianjing.model.towers.families import load_tower, tower_family
from dianjing.pictures.image import ImageProcessor
from dianjing.plan.weights import weights_of_recipe
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model
from tests.packs import outcome, prepare
from tests.tower_table import DEPTH, ROWS, STRETCHED, distances, table, write

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ROWS)
def test_features_and_pixels_are_transformers(name: str, tmp_path: Path) -> None:
    """Of two pictures, none of them square; the tower is in training mode, as it is in a run."""
    row = ROWS[name]
    pixels, features = distances(row, tmp_path)
    assert features <= 1e-5
    a_level = 1 / 255 / min(STRETCHED.image_std)
    assert pixels <= (a_level if row.float_pixels else 0)


@pytest.mark.parametrize("name", ROWS)
def test_what_a_family_says_of_itself(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    write(row, tmp_path)
    tower, _ = load_tower(tmp_path, torch.float32)
    family = tower_family(tower.config)
    states = family.states(tower, torch.zeros(1, 3, 28, 28), DEPTH)
    rows, columns = family.grid(tower.config, (28, 28))
    assert states.shape[1] == row.extra + rows * columns
    assert family.extra_tokens(tower.config) == row.extra
    assert family.layouts(tower.config) == frozenset(row.layouts)


@pytest.mark.parametrize("doc", ["docs/models.md", "docs/models_zh.md"])
def test_the_table_of_the_docs_is_measured(doc: str) -> None:
    text = (ROOT / doc).read_text(encoding="utf-8")
    for line in table():
        assert line in text, f"{doc}: write the lines of `python -m tests.tower_table`"


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3 registers", "vit"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_tower_trains_in_both_stages(make_recipe: MakeRecipe, tmp_path: Path, name: str, tuning: str) -> None:
    write(ROWS[name], tmp_path / "tower")
    for stage, how in (("pretrain", "frozen"), ("finetune", tuning)):
        recipe = make_recipe(stage, vision_tower={"folder": str(tmp_path / "tower"), "tuning": how})
        model, dataset = prepare(recipe)
        _, gradients = outcome(model, [dataset.batch([0, 1])])
        assert gradients
        assert all(gradient is not None for gradient in gradients.values())
        assert dataset.encoder.picture_tokens() == 4
        found = weights_of_recipe(recipe)
        assert found.shapes.image_tokens == found.shapes.patches == 4
        assert found.shapes.positions == 4 + ROWS[name].extra


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_an_export_is_read_by_stock_transformers(make_recipe: MakeRecipe, tmp_path: Path, name: str) -> None:
    write(ROWS[name], tmp_path / "tower")
    recipe = make_recipe("pretrain", vision_tower={"folder": str(tmp_path / "tower")})
    assert "hf" not in refusals(recipe)
    loaded = loaded_model(recipe)
    export(loaded, tmp_path / "out")
    again = load_for_use(str(tmp_path / "out"), "cpu")
    pixels = torch.randn(2, 3, 28, 28)
    stock: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    expected = image_features(loaded.model, pixels)
    assert torch.equal(image_features(again.model, pixels), expected)
    found = torch.stack(list(stock.get_image_features(pixels, output_hidden_states=True).pooler_output))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_registers_are_refused_before_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write(ROWS["registers"], tmp_path / "tower")
    recipe = make_recipe("pretrain", vision_tower={"folder": str(tmp_path / "tower")})
    assert "has no place for a DINOv2 with registers vision tower" in refusals(recipe)["hf"]
    with pytest.raises(ExportError, match="DINOv2 with registers"):
        export(loaded_model(recipe), tmp_path / "out")


def test_the_size_of_a_picture_is_the_preprocessings(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write(ROWS["dinov2"], tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["crop_size"] = {"height": 42, "width": 42}
    settings["size"] = {"shortest_edge": 48}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    built = build(make_recipe("pretrain", vision_tower={"folder": str(tmp_path)}))
    assert built.encoder.picture_tokens() == built.model.config.image_seq_length == 9
    assert ImageProcessor.from_folder(tmp_path).size == 42
