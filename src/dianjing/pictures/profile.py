"""Embedded colour profiles -> sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
STEPS = 9
"""Colours of each channel with which a profile is held against sRGB."""
State = Literal["", "srgb", "applied", "unusable"]


def profile_state(image: Image.Image) -> State:
    """Return what becomes of the profile of an opened picture; "" when it has none, "srgb" when nothing has to."""
    profile = image.info.get("icc_profile")
    if not profile:
        return ""
    transform = _transform(profile, _mode_in_profile(image.mode))
    return transform if isinstance(transform, str) else "applied"


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture of mode L, RGB or CMYK in sRGB; as it is when its profile is sRGB, or cannot be used."""
    if not profile:
        return image
    transform = _transform(profile, image.mode)
    if isinstance(transform, str) and image.mode == "L":
        image = image.convert("RGB")  # grey stored with a profile for colours
        transform = _transform(profile, "RGB")
    return image if isinstance(transform, str) else ImageCms.applyTransform(image, transform) or image


def _mode_in_profile(mode: str) -> str:
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode in ("L", "LA", "La", "1") or mode.startswith("I") else "RGB"


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | Literal["srgb", "unusable"]:
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if SPACES.get(source.profile.xcolor_space) != mode:
            return "unusable"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError, ValueError):
        return "unusable"
    if mode == "RGB":
        steps = np.linspace(0, 255, STEPS).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(STEPS, -1, 3)
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
        if np.abs(moved.astype(int) - colours).max() <= 1:
            return "srgb"
    return transform
