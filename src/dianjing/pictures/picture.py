"""Path -> upright picture, safely: no way out of the folder, no bomb, nothing broken; and nothing slow to import."""

from __future__ import annotations

import os
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from dianjing.errors import DataError

Transparency = Literal["white", "drop"]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a complete file of a format ends."""
MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384
"""A picture is padded to the square of its longer side: this bounds the memory."""
NAME_SHOWN = 200
"""Characters of a name in a message."""
MAX_RATIO = 200
"""Longer to shorter side: the crop first enlarges the shorter side to the tower's."""


class PictureError(DataError):
    """Why a picture cannot be used."""

    def __init__(self, code: str, name: str, message: str) -> None:
        super().__init__(f'picture "{name[:NAME_SHOWN]}": {message}')
        self.code = code


def load_image(root: str, name: str) -> Image.Image:
    """Return the picture `name` of the folder `root`, upright, as RGB; as RGBA if it has transparency.

    Raises:
        PictureError: the name leads out of the folder, or the file is missing, broken, too large or no picture.
    """
    with open_picture(picture_path(root, name), name) as image:
        return decode(image, name)


def decode(image: Image.Image, name: str) -> Image.Image:
    """Return an opened picture, upright, as RGB; as RGBA if it has transparency.

    Raises:
        PictureError: its file is broken.
    """
    try:
        image.load()
        return _to_rgb_or_rgba(ImageOps.exif_transpose(image), name)
    except PictureError:
        raise
    except Exception as error:  # what Pillow raises for a broken file depends on where it is broken
        code = "picture_truncated" if "truncated" in str(error).lower() else "picture_broken"
        raise PictureError(code, name, f"the file is broken ({error}); replace it") from error


def opaque(image: Image.Image, transparency: Transparency = "white") -> Image.Image:
    """Return an RGB or RGBA picture as RGB, laid on white or with its alpha channel dropped."""
    if image.mode == "RGB":
        return image
    if transparency == "white":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def check_image(root: str, name: str) -> int:
    """Return the size of a picture's file in bytes, after a look at its header and its end.

    Raises:
        PictureError: as `load_image` does; a file that looks complete is not decoded, which keeps this fast.
    """
    path = picture_path(root, name)
    with open_picture(path, name) as image, open(path, "rb") as file:
        ending = ENDINGS.get(image.format or "", b"")
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - len(ending), 0))
        complete = bool(ending) and file.read() == ending
    if not complete:
        load_image(root, name)
    return size


def picture_path(root: str, name: str) -> str:
    """Return the path of the picture `name` of the folder `root`, symbolic links followed.

    Raises:
        PictureError: the name leads out of the folder, or nothing is there.
    """
    folder = os.path.realpath(root)
    if "\0" in name or "://" in name or name.startswith("data:") or os.path.isabs(name):
        code = "path_absolute" if os.path.isabs(name) else "path_url"
        raise PictureError(code, name, "not a path inside the image folder; write one relative to it")
    path = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder:
        raise PictureError("path_outside", name, f"it leads out of the image folder {root}; put the picture inside")
    if not os.path.isfile(path):
        message = f"no such file in {root}; add the picture, or name its folder (data.images)"
        raise PictureError("picture_missing", name, message)
    return path


def open_picture(path: str, name: str) -> Image.Image:
    """Open a picture of an allowed format and size; nothing is decoded yet.

    Raises:
        PictureError: it is too large, or no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # as above
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not one, or broken"
        message = f"cannot be opened as {', '.join(FORMATS)} ({reason})"
        raise PictureError("picture_format", name, message) from None
    shorter, longer = sorted(image.size)
    if shorter * longer > MAX_PIXELS or longer > MAX_SIDE or longer > MAX_RATIO * shorter:
        image.close()
        raise _too_large(name, image.size)
    return image


def _too_large(name: str, size: tuple[int, int] | None = None) -> PictureError:
    measured = f"{size[0]}x{size[1]} pixels are" if size else "it is"
    return PictureError(
        "picture_too_large",
        name,
        f"{measured} too large or too narrow; at most {MAX_PIXELS // 1_000_000} "
        f"megapixels, {MAX_SIDE} pixels a side and {MAX_RATIO}:1 are read; scale or cut it",
    )


def _to_rgb_or_rgba(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F"):
        raise PictureError("picture_32bit", name, "32-bit pixels have no known white; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        # Pillow would clip all above 255 to white.
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    transparent = "A" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")
