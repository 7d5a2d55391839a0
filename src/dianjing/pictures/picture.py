"""Path -> RGB picture, safely: no way out of the folder, no bomb, nothing broken; and nothing slow to import."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps

from dianjing.extras import install
from dianjing.pictures import dicom, kinds, tiff
from dianjing.pictures.profile import to_srgb
from dianjing.pictures.rule import NAME_SHOWN as NAME_SHOWN
from dianjing.pictures.rule import PLAIN, PictureError, PictureRule
from dianjing.pictures.threads import WARNINGS
from dianjing.pictures.wide import Depth, Samples, depth_of, samples_of, to_8_bits

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that Pillow opens; DICOM and HEIC are opened by packages that may be missing."""
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "HEIF": (".heic", ".heif", ".hif"),
    "DICOM": (".dcm", ".dicom", ".dic"),
}
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""How a complete file of a format ends."""
MAX_PIXELS = 50_000_000
MAX_SIDE = 16_384
"""A picture is padded to the square of its longer side: this bounds the memory."""
MAX_RATIO = 200
"""Longer to shorter side: the crop first enlarges the shorter side to the tower's."""
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_FRAME = re.compile(r"(.+)#([1-9]\d{0,5})", re.DOTALL)


def load_image(root: str, name: str, rule: PictureRule = PLAIN) -> Image.Image:
    """Return the picture `name` of the folder `root` as RGB, upright.

    Raises:
        PictureError: the name leads out of the folder, or the file is missing, broken, too large or no picture.
    """
    path, frame = locate(root, name)
    with open_picture(path, name, frame) as image:
        return decode(image, name, rule)


def decode(image: Image.Image, name: str, rule: PictureRule = PLAIN) -> Image.Image:
    """Return an opened picture as RGB, upright.

    Raises:
        PictureError: its file is broken, or nothing says how bright it is.
    """
    with naming_breaks(name):
        return to_rgb(image, read_samples(image, name), name, rule)


def to_rgb(image: Image.Image, samples: Samples | None, name: str, rule: PictureRule) -> Image.Image:
    """Return an opened picture as `decode` does; `samples` are those of one with more than 8 bits.

    Raises:
        PictureError: nothing says how bright it is, or it has 32 bits.
    """
    lies = orientation(image)
    upright = _turned(to_8_bits(samples, name, rule), lies) if samples else _upright(image, name)
    return _finished(upright, image.info, rule)


@contextmanager
def naming_breaks(name: str) -> Generator[None]:
    """Say of which picture a file is broken.

    Raises:
        PictureError: it is.
    """
    try:
        yield
    except PictureError:
        raise
    except Exception as error:  # what Pillow raises for a broken file depends on where it is broken
        code = "picture_truncated" if "truncated" in str(error).lower() else "picture_broken"
        raise PictureError(code, name, f"the file is broken ({error}); replace it") from error


def check_image(root: str, name: str, rule: PictureRule = PLAIN) -> int:
    """Return the size of a picture's file in bytes, after a look at its header and its end.

    Raises:
        PictureError: as `load_image` does; a file that looks complete is not decoded, which keeps this fast.
    """
    path, frame = locate(root, name)
    with open_picture(path, name, frame) as image, open(path, "rb") as file:
        ending = ENDINGS.get(image.format or "", b"")
        file.seek(0, os.SEEK_END)
        size = file.tell()
        file.seek(max(size - len(ending), 0))
        complete = bool(ending) and file.read() == ending
        depth = read_depth(image, name)
    if not complete or (depth and not depth.white and not rule.white):
        load_image(root, name, rule)
    return size


def picture_path(root: str, name: str) -> str:
    """Return the path of the file of the picture `name` of the folder `root`, symbolic links followed.

    Raises:
        PictureError: the name is not a path inside the folder, or nothing is there.
    """
    return locate(root, name)[0]


def locate(root: str, name: str) -> tuple[str, int]:
    """Return the path of a picture's file, symbolic links followed, and which of its frames or pages is meant.

    "scan.dcm#3" is frame 2, counted from 0, of scan.dcm, where no file is called so.

    Raises:
        PictureError: the name leads out of the folder, or nothing is there.
    """
    folder = os.path.realpath(root)
    if "\0" in name or "://" in name or name.startswith("data:") or os.path.isabs(name):
        code = "path_absolute" if os.path.isabs(name) else "path_url"
        raise PictureError(code, name, "not a path inside the image folder; write one relative to it")
    path, frame = os.path.realpath(os.path.join(folder, name)), 0
    if os.path.commonpath([folder, path]) != folder:
        raise PictureError("path_outside", name, f"it leads out of the image folder {root}; put the picture inside")
    if not os.path.isfile(path):
        if chosen := _FRAME.fullmatch(name):
            return locate(root, chosen[1])[0], int(chosen[2]) - 1
        message = f"no such file in {root}; add the picture, or name its folder (--images; in a recipe data.images)"
        raise PictureError("picture_missing", name, message)
    return path, frame


def open_picture(path: str, name: str, frame: int = 0) -> Image.Image:
    """Open a picture of an allowed format and size; nothing is decoded yet.

    Raises:
        PictureError: it is too large, no picture, or has no such frame.
    """
    try:
        with WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except Exception as error:  # as above
        image = _open_otherwise(path, name, error)
    shorter, longer = sorted(image.size)
    if shorter * longer > MAX_PIXELS or longer > MAX_SIDE or longer > MAX_RATIO * shorter:
        image.close()
        raise _too_large(name, image.size)
    setattr(image, "filename", "")  # noqa: B010  else Pillow maps it into memory, and turns uncompressed TIFF wrongly
    if frame:
        frames = getattr(image, "n_frames", 1)
        if frame >= frames:
            image.close()
            raise PictureError("picture_missing", name, f"the file has {frames} frames or pages")
        image.seek(frame)
    return image


def orientation(image: Image.Image) -> int:
    """Return how an opened picture lies, in EXIF's numbers; 1 is upright."""
    tags: Any = getattr(image, "tag_v2", None)
    return (image.getexif() if tags is None else tags).get(tiff.ORIENTATION, 1)


def read_depth(image: Image.Image, name: str) -> Depth | None:
    """Return what the header of an opened picture says of its depth; None for 8 bits or fewer.

    Raises:
        PictureError: its samples are of a kind that is not read.
    """
    try:
        return depth_of(image)
    except ValueError as error:
        raise _unread_tiff(name, error) from None


def read_samples(image: Image.Image, name: str) -> Samples | None:
    """Return the samples of an opened picture with more than 8 bits, None for any other.

    Raises:
        PictureError: they cannot be read.
    """
    if isinstance(image, dicom.DicomPicture):
        return dicom.dicom_samples(image, name)
    depth = read_depth(image, name)
    return samples_of(image, depth) if depth else None


def transparent(image: Image.Image) -> bool:
    """Return whether some of an opened picture lets the ground through."""
    if image.format == "TIFF" and image.mode == "RGBA" and not _extra_samples(image):
        return False  # four samples, and nothing says that the last is transparency
    return image.mode in TRANSPARENT or "transparency" in image.info


def _extra_samples(image: Image.Image) -> bool:
    return tiff.EXTRA_SAMPLES in getattr(image, "tag_v2", {tiff.EXTRA_SAMPLES: 2})


def _open_otherwise(path: str, name: str, error: Exception) -> Image.Image:
    """Open what Pillow alone does not, or say what it is.

    Raises:
        PictureError: nothing opens it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as unread:
        raise PictureError("picture_format", name, f"cannot be opened ({unread.strerror})") from None
    if kinds.is_dicom(start) or name.lower().endswith(".dcm"):
        return dicom.open_dicom(path, name)
    if kinds.is_heif(start):
        return _open_heif(path, name)
    if kinds.is_tiff(start):
        return _open_tiff(path, name)
    if what := kinds.description(start):
        raise PictureError("picture_format", name, what)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else "not one, or broken"
    raise PictureError("picture_format", name, f"cannot be opened as {', '.join(FORMATS)} ({reason})")


def _open_heif(path: str, name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        text = f"HEIC, which needs pillow-heif: {install('heic')}; or save it as JPEG"
        raise PictureError("picture_format", name, text) from None
    pillow_heif.register_heif_opener()
    try:
        return Image.open(path, formats=["HEIF"])
    except Exception as error:  # as above
        raise PictureError("picture_broken", name, f"the file is broken ({error}); replace it") from None


def _open_tiff(path: str, name: str) -> Image.Image:
    try:
        return tiff.open_tiff(path)
    except ValueError as error:
        raise _unread_tiff(name, error) from None
    except Exception as error:  # as above
        raise PictureError("picture_broken", name, f"the file is broken ({error}); replace it") from None


def _unread_tiff(name: str, error: ValueError) -> PictureError:
    return PictureError("picture_format", name, f"a TIFF with {error}; save it as RGB or grey with 8 or 16 bits")


def _too_large(name: str, size: tuple[int, int] | None = None) -> PictureError:
    measured = f"{size[0]}x{size[1]} pixels are" if size else "it is"
    return PictureError(
        "picture_too_large",
        name,
        f"{measured} too large or too narrow; at most {MAX_PIXELS // 1_000_000} "
        f"megapixels, {MAX_SIDE} pixels a side and {MAX_RATIO}:1 are read; scale or cut it",
    )


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Return a picture of 8 bits or fewer, decoded and turned.

    Raises:
        PictureError: it has 32 bits.
    """
    if image.mode in ("I", "F"):
        raise PictureError("picture_32bit", name, "32-bit pixels have no known white; save it with 8 or 16 bits")
    opaque = not transparent(image)
    image.load()
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGB") if opaque and upright.mode == "RGBA" else upright


def _turned(image: Image.Image, lies: int) -> Image.Image:
    """Return a picture turned from EXIF's orientation."""
    image.getexif()[tiff.ORIENTATION] = lies
    return ImageOps.exif_transpose(image)


def _finished(image: Image.Image, info: dict[Any, Any], rule: PictureRule) -> Image.Image:
    """Return a picture of any mode as RGB, by the rule, and nothing else of its file."""
    profile = info.get("icc_profile") if rule.profiles == "srgb" else None
    alpha = None
    if image.mode in TRANSPARENT or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image, alpha = rgba.convert("L" if image.mode in ("L", "LA", "La") and profile else "RGB"), rgba.getchannel("A")
    elif image.mode not in ("L", "RGB", "CMYK") or (image.mode != "RGB" and not profile):
        image = image.convert("RGB")
    image = to_srgb(image, profile).convert("RGB")
    if alpha and rule.transparency == "white":
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    image.info.clear()
    return image
