"""Picture files, each opened and decoded as training does it -> their faults, with hashes of their looks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dianjing.pictures.picture import PictureError, check_image, decode, opaque, open_picture, picture_path

TINY = 16
"""Pixels of the shorter side."""
NARROW = 10
"""Longer to shorter side."""
FLAT = 3
"""Levels of 255 within which two neighbours count as the same, so that noise in an even area changes nothing."""
THUMB = 8
"""Side in pixels of the picture that is compared."""
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture file."""

    code: str = ""
    text: str = ""
    """Why it cannot be used; "" when it can."""
    passes: bool = False
    """Training begins with it: it is whole as far as header and end tell."""
    notes: tuple[tuple[str, str], ...] = ()
    """Code and sentence of what is odd about it."""
    size: tuple[int, int] = (0, 0)
    content: int = 0
    """Hash of the file."""
    gradient: int = 0
    """64-bit dHash: whether each of 8 x 8 grey pixels is brighter than its left neighbour."""
    thumb: bytes = b""
    """THUMB x THUMB pixels, RGB; empty for a picture of one colour."""


class PictureChecker:
    """Checks pictures of one folder."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __call__(self, names: Sequence[str]) -> list[Picture]:
        """Return what each picture is like."""
        return [self._check(name) for name in names]

    def _check(self, name: str) -> Picture:
        try:
            path = picture_path(self._root, name)
            with open_picture(path, name) as image:
                upright = opaque(decode(image, name))
                notes = [*_file_notes(image, name)]
        except PictureError as error:
            return Picture(code=error.code, text=str(error), passes=self._passes(name))
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()
        small = upright.resize((36, 32), Image.Resampling.BOX)
        grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
        blank = len(upright.getcolors(1) or ()) == 1
        if blank:
            notes.append(("picture_blank", "one colour and nothing else"))
        return Picture(
            passes=True,
            notes=(*notes, *_size_notes(*upright.size)),
            size=upright.size,
            content=int.from_bytes(content, "little"),
            gradient=int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1] + FLAT).tobytes(), "big"),
            thumb=b"" if blank else small.resize((THUMB, THUMB), Image.Resampling.BOX).tobytes(),
        )

    def _passes(self, name: str) -> bool:
        try:
            check_image(self._root, name)
        except PictureError:
            return False
        return True


def _file_notes(image: Image.Image, name: str) -> Iterator[tuple[str, str]]:
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in SUFFIXES.get(image.format or "", (suffix,)):
        yield "picture_suffix", f"the file is {image.format}, its name ends in {suffix or 'nothing'}"
    if image.mode.startswith("I;16"):
        yield "picture_16bit", "16-bit grey, scaled to 8 bits"
    if "A" in image.getbands() or "transparency" in image.info:
        yield "picture_alpha", "transparent: laid on white, unless data.transparency says otherwise"
    if getattr(image, "is_animated", False):
        yield "picture_animated", f"{getattr(image, 'n_frames', 2)} frames, of which the first is read"
    turned = image.getexif().get(_ORIENTATION, 1)
    if turned != 1:
        yield "picture_rotated", f"EXIF orientation {turned}"


def _size_notes(width: int, height: int) -> Iterator[tuple[str, str]]:
    shorter, longer = sorted((width, height))
    if shorter < TINY:
        yield "picture_tiny", f"{width}x{height} pixels"
    if longer > NARROW * shorter:
        yield "picture_narrow", f"{width}x{height} pixels"
