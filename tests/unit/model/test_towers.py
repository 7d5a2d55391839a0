"""Each family of towers against transformers' own model and image processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

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

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
DINO = SIZES | {"image_size": 56, "mlp_ratio": 2}
PLAIN = SIZES | {"image_size": 28, "intermediate_size": 40}
CROPPED = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
STRETCHED = ViTImageProcessorPil(size={"height": 28, "width": 28})


@dataclass(frozen=True)
class Row:
    """A family: transformers' model, its extra tokens, the layouts that hold it."""

    model: Any
    config: Any
    extra: int
    layouts: tuple[str, ...] = ()
    processor: Any = CROPPED


ROWS = {
    "clip": Row(CLIPVisionModel, CLIPVisionConfig(**PLAIN), 1, ("gguf", "hf", "llava", "xtuner")),
    "siglip": Row(SiglipVisionModel, SiglipVisionConfig(**PLAIN), 0, ("gguf", "hf"), STRETCHED),
    "dinov2": Row(Dinov2Model, Dinov2Config(**DINO), 1, ("hf",)),
    "dinov2 gated": Row(Dinov2Model, Dinov2Config(**DINO, use_swiglu_ffn=True), 1, ("hf",)),
    "dinov2 classifier": Row(Dinov2ForImageClassification, Dinov2Config(**DINO), 1, ("hf",)),
    "registers": Row(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 5),
    "dinov3": Row(DINOv3ViTModel, DINOv3ViTConfig(**PLAIN, num_register_tokens=0), 1, ("hf",), STRETCHED),
    "dinov3 registers": Row(DINOv3ViTModel, DINOv3ViTConfig(**PLAIN, num_register_tokens=4), 5, (), STRETCHED),
    "vit": Row(ViTModel, ViTConfig(**PLAIN), 1, (), STRETCHED),
    "vit classifier": Row(ViTForImageClassification, ViTConfig(**PLAIN), 1, (), STRETCHED),
}


def write(row: Row, folder: Path) -> Any:
    """Save a random model and its processor, and return the model without a classifier."""
    torch.manual_seed(0)
    model = row.model(row.config).eval()
    model.save_pretrained(folder)
    row.processor.save_pretrained(folder)
    return getattr(model, "dinov2", getattr(model, "vit", model))


@pytest.mark.parametrize("name", ROWS)
def test_features_and_pixels_are_transformers(name: str, tmp_path: Path) -> None:
    """Of two pictures, none of them square; the tower is in training mode, as it is in a run."""
    row = ROWS[name]
    expected = write(row, tmp_path)
    tower, _ = load_tower(tmp_path, torch.float32)
    family = tower_family(tower.config)
    pictures = [Image.effect_noise(size, 80).convert("RGB") for size in ((47, 19), (30, 61))]
    theirs = torch.as_tensor(np.stack(row.processor(pictures, return_tensors="pt")["pixel_values"]))
    processor = family.preprocessing(tmp_path, "crop")
    assert torch.equal(torch.stack([processor(picture) for picture in pictures]), theirs)
    states = family.states(tower.train(), theirs, 2)
    torch.testing.assert_close(states, expected(theirs, output_hidden_states=True).hidden_states[2], atol=1e-5, rtol=0)
    rows, columns = family.grid(tower.config, (28, 28))
    assert states.shape[1] == row.extra + rows * columns
    assert family.extra_tokens(tower.config) == row.extra
    assert family.layouts(tower.config) == frozenset(row.layouts)


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
