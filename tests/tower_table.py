"""The table of vision towers in docs/models.md, measured on random towers: python -m tests.tower_table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
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

from dianjing.model.towers.families import load_tower, tower_family

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
DINO = SIZES | {"image_size": 56, "mlp_ratio": 2}
PLAIN = SIZES | {"image_size": 28, "intermediate_size": 40}
CROPPED = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
STRETCHED = ViTImageProcessorPil(size={"height": 28, "width": 28})
DEPTH = 2


@dataclass(frozen=True)
class Row:
    """A family: transformers' model, its extra tokens, the export formats that hold it, its image processor."""

    title: str
    model: Any
    config: Any
    extra: int
    layouts: tuple[str, ...] = ()
    processor: Any = CROPPED
    float_pixels: bool = False
    """True if transformers resizes pictures as floating-point numbers (DINOv3); all others resize bytes."""


ROWS = {
    "clip": Row("CLIP", CLIPVisionModel, CLIPVisionConfig(**PLAIN), 1, ("gguf", "hf", "llava", "xtuner")),
    "siglip": Row(
        "SigLIP, SigLIP 2 of fixed size", SiglipVisionModel, SiglipVisionConfig(**PLAIN), 0, ("gguf", "hf"), STRETCHED
    ),
    "dinov2": Row("DINOv2", Dinov2Model, Dinov2Config(**DINO), 1, ("hf",)),
    "dinov2 gated": Row(
        "DINOv2 with a gated MLP (giant)", Dinov2Model, Dinov2Config(**DINO, use_swiglu_ffn=True), 1, ("hf",)
    ),
    "dinov2 classifier": Row(
        "DINOv2 out of an image classifier", Dinov2ForImageClassification, Dinov2Config(**DINO), 1, ("hf",)
    ),
    "registers": Row(
        "DINOv2 with 4 registers",
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**DINO, num_register_tokens=4),
        5,
    ),
    "dinov3": Row(
        "DINOv3 ViT without registers",
        DINOv3ViTModel,
        DINOv3ViTConfig(**PLAIN, num_register_tokens=0),
        1,
        ("hf",),
        STRETCHED,
        float_pixels=True,
    ),
    "dinov3 registers": Row(
        "DINOv3 ViT with 4 registers",
        DINOv3ViTModel,
        DINOv3ViTConfig(**PLAIN, num_register_tokens=4),
        5,
        (),
        STRETCHED,
        float_pixels=True,
    ),
    "vit": Row("ViT", ViTModel, ViTConfig(**PLAIN), 1, (), STRETCHED),
    "vit classifier": Row(
        "ViT out of an image classifier", ViTForImageClassification, ViTConfig(**PLAIN), 1, (), STRETCHED
    ),
}


def write(row: Row, folder: Path) -> Any:
    """Save a random model and its processor, and return the model without a classifier."""
    torch.manual_seed(0)
    model = row.model(row.config).eval()
    model.save_pretrained(folder)
    row.processor.save_pretrained(folder)
    return getattr(model, "dinov2", getattr(model, "vit", model))


def pictures() -> list[Image.Image]:
    """Return two pictures of noise, one wide and one tall."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in ((19, 47), (61, 30))]


def float_resized(image: Image.Image) -> Tensor:
    """Return a picture as DINOv3's image processor makes it: scaled to 0..1, then resized, then normalised."""
    colours = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(colours, (28, 28), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (STRETCHED.image_mean, STRETCHED.image_std))
    return (resized - mean) / std


def distances(row: Row, folder: Path) -> tuple[float, float]:
    """Return the largest difference of pixel values and of features to transformers' own, for two pictures at once.

    Pixel values are colours of 0 to 1, less the mean and over the standard deviation. The features are those after
    two layers, in fp32, the tower in training mode as in a run.
    """
    expected = write(row, folder)
    tower, _ = load_tower(folder, torch.float32)
    family = tower_family(tower.config)
    processor = family.preprocessing(folder, "crop")
    ours = torch.stack([processor(picture) for picture in pictures()])
    if row.float_pixels:
        theirs = torch.stack(list(map(float_resized, pictures())))
    else:
        theirs = torch.as_tensor(np.stack(row.processor(pictures(), return_tensors="pt")["pixel_values"]))
    with torch.no_grad():
        states = family.states(tower.train(), theirs, DEPTH)
        features = expected(theirs, output_hidden_states=True).hidden_states[DEPTH]
    return float((ours - theirs).abs().max()), float((states - features).abs().max())


def table() -> Iterator[str]:
    """Yield a line of the table for each family."""
    for row in ROWS.values():
        with tempfile.TemporaryDirectory() as folder:
            pixels, features = distances(row, Path(folder))
        extra = {0: "none", 1: "class token"}.get(row.extra, f"class token, {row.extra - 1} registers")
        exports = ", ".join(row.layouts) or "-"
        yield f"| {row.title} | {extra} | {pixels:.2g} | {features:.2g} | {exports} |"


if __name__ == "__main__":
    print(*table(), sep="\n")
