"""Picture -> pixel_values (3, height, width): pad to a square or crop, the tower's own numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.pictures.picture import check_image as check_image
from dianjing.pictures.picture import load_image as load_image
from dianjing.pictures.rule import PLAIN, PictureRule

Aspect = Literal["pad", "crop"]
RULE_KEY = "dianjing_pictures"
"""Where the preprocessor_config.json of an export says by which rule pictures are read, if it is not PLAIN."""


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """The vision tower's preprocessing, bit-equal to transformers' CLIP and SigLIP image processors (Pil)."""

    size: int
    """Height and width of the result in pixels."""
    crop: bool
    """The shorter side becomes `edge`, the centre is kept (CLIP); else both are stretched to `size` (SigLIP)."""
    edge: int = 0
    """The shorter side before the centre is cut out (DINOv2: larger than `size`); 0 = `size`."""
    resample: int
    """Pillow's number of the resampling filter."""
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: Aspect
    """"pad": first make it a square on the mean colour, as XTuner's pad_image_to_square."""
    rule: PictureRule = PLAIN
    """How the files of its pictures are read."""

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], aspect: Aspect | None = None, rule: PictureRule | None = None
    ) -> ImageProcessor:
        """Read the preprocessing of a vision tower, or of an export, from its folder.

        None is what the folder says; for `aspect` (do_pad) "pad" if it says nothing.

        Raises:
            ModelError: the folder has none, or one that is not CLIP's or SigLIP's.
        """
        path, config = _read_config(Path(folder))
        try:
            edge = size = _side(config["size"])
            crop = bool(config.get("do_center_crop", "crop_size" in config))
            if crop and (size := _side(config["crop_size"])) > edge:
                raise ValueError(f"crop_size {config['crop_size']} is larger than size {config['size']}")
            pads = str(config.get("image_processor_type")).startswith("LlavaImageProcessor") and config.get("do_pad")
            if not crop and not pads and isinstance(config["size"], Mapping) and "shortest_edge" in config["size"]:
                raise ValueError("it makes pictures of any shape (shortest_edge, and nothing is cropped)")
            for step in ("do_resize", "do_rescale", "do_normalize"):
                if not config.get(step, True):
                    raise ValueError(f"{step} is false")
            return cls(
                size=size,
                crop=crop,
                edge=edge,
                resample=int(config.get("resample", Image.Resampling.BICUBIC)),
                rescale=float(config.get("rescale_factor", 1 / 255)),
                mean=_colour(config["image_mean"]),
                std=_colour(config["image_std"]),
                aspect=aspect or ("pad" if config.get("do_pad", True) else "crop"),
                rule=rule or PictureRule.read(config.get(RULE_KEY, {})),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ModelError(f"{path}: not a preprocessing that can be done here: {reason}") from None

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 height width"]:
        """Return the pixel values of an RGB picture."""
        return pixel_values(self.pixels(image)[None], self.table())[0]

    def pixels(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """Return an RGB picture padded, resized and cropped, its colours still bytes."""
        if self.aspect == "pad":
            image = self._padded(image)
        return torch.tensor(np.asarray(self._resized(image))).permute(2, 0, 1).contiguous()

    def table(self) -> Float[Tensor, "3 256"]:
        """Return the pixel value of each byte, a row a channel."""
        # float64 and back, as transformers does it: bit-equal, not only close.
        scaled = (torch.arange(256).double() * self.rescale).float()
        mean, std = (torch.tensor(values)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std

    def to_picture(self, pixel_values: Float[Tensor, "3 height width"]) -> Image.Image:
        """Return what the tower sees as a picture again."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = ((pixel_values * std + mean) / self.rescale).round().clamp(0, 255)
        return Image.fromarray(pixels.byte().permute(1, 2, 0).numpy())

    def _padded(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        background = tuple(int(value * 255) for value in self.mean)
        square = Image.new("RGB", (side, side), background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resized(self, image: Image.Image) -> Image.Image:
        resample = Image.Resampling(self.resample)
        if not self.crop:
            return image.resize((self.size, self.size), resample)
        edge = self.edge or self.size
        longer = int(edge * max(image.size) / min(image.size))
        width, height = (edge, longer) if image.width <= image.height else (longer, edge)
        image = image.resize((width, height), resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


def pixel_values(
    pixels: UInt8[Tensor, "images 3 height width"], table: Float[Tensor, "3 256"]
) -> Float[Tensor, "images 3 height width"]:
    """Return what the tower reads, on the device of `pixels`."""
    channels = [table[channel][pixels[:, channel].int()] for channel in range(3)]
    return torch.stack(channels, dim=1)


def _read_config(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{path}: not JSON: {error}") from None
            return path, config.get("image_processor", config)
    raise ModelError(f"{folder}: no preprocessor_config.json; copy it from the vision tower's repository")


def _side(value: Any) -> int:
    """Return the one length that a size of the config gives: an int, an edge, or equal sides."""
    if isinstance(value, Mapping):
        lengths = cast(Mapping[str, Any], value)
        if len(set(lengths.values())) != 1:
            raise ValueError(f"size {lengths}")
        value = next(iter(lengths.values()))
    return int(value)


def _colour(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
