"""The header of a picture -> what is odd about its file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from PIL import Image

from dianjing.pictures import tiff
from dianjing.pictures.picture import SUFFIXES, orientation, transparent
from dianjing.pictures.profile import profile_state
from dianjing.pictures.rule import PictureRule

SEEN_OTHERWISE = {
    "picture_rotated": "turned by EXIF",
    "picture_16bit": "with more than 8 bits",
    "picture_profile": "with a colour profile",
    "picture_alpha": "transparent",
}
"""Notes of what other programs show otherwise, or not at all, in words."""
LAID = {"white": "laid on white", "drop": "its transparency ignored"}
SUBFILE, DESCRIPTION, DNG_VERSION = 254, 270, 50706
REDUCED = 1
"""The bit of NewSubfileType that marks a smaller copy of another page."""
_OME_CHANNELS = re.compile(r'<(?:\w+:)?Pixels\b[^>]*\bSizeC="(\d+)"')
_IMAGEJ_CHANNELS = re.compile(r"^channels=(\d+)", re.MULTILINE)


def file_notes(image: Image.Image, name: str, rule: PictureRule) -> Iterator[tuple[str, str]]:
    """Yield code and sentence of what is odd about an opened picture's file."""
    suffix = os.path.splitext(name.rpartition("#")[0] if image.tell() else name)[1].lower()
    kind = "JPEG" if image.format == "MPO" else image.format or ""
    if suffix not in SUFFIXES.get(kind, (suffix,)) and (kind != "DICOM" or suffix in _ALL_SUFFIXES):
        yield "picture_suffix", f"the file is {kind}, its name ends in {suffix or 'nothing'}"
    if transparent(image):
        yield "picture_alpha", f"transparent, {LAID[rule.transparency]}"
    state = profile_state(image)
    if state == "unusable":
        yield "picture_profile", "a colour profile that does not fit the picture, and is ignored"
    elif state == "applied":
        yield "picture_profile", f"a colour profile, {'applied' if rule.profiles == 'srgb' else 'ignored'}"
    if image.format == "TIFF":
        yield from _tiff_notes(image)
    elif getattr(image, "is_animated", False) or getattr(image, "n_frames", 1) > 1:
        yield "picture_animated", _frames(getattr(image, "n_frames", 2), "frames", image.tell())
    turned = orientation(image)
    if turned != 1:
        yield "picture_rotated", f"EXIF orientation {turned}"


_ALL_SUFFIXES = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


def _frames(number: int, what: str, read: int) -> str:
    which = "the first" if read == 0 else f"number {read + 1}"
    return f'{number} {what}, of which {which} is read ("NAME#2" is the second)'


def _tiff_notes(image: Image.Image) -> Iterator[tuple[str, str]]:
    tags: Any = getattr(image, "tag_v2")  # noqa: B009  Pillow's type does not have it
    pages = getattr(image, "n_frames", 1)
    page = image.tell()
    channels = _channels(str(tags.get(DESCRIPTION, "")))
    if DNG_VERSION in tags:
        yield "picture_preview", "a raw photo (DNG), of which the preview is read; develop it"
    elif tags.get(SUBFILE, 0) & REDUCED:
        yield "picture_preview", f"page {page + 1} of {pages} says that it is a preview or a label of another page"
    elif channels > 1 and pages > 1 and tags.get(tiff.SAMPLES, 1) == 1:
        yield "picture_channels", f"{channels} channels, each a page of its own; page {page + 1} alone is read"
    elif pages > 1:
        yield "picture_animated", _frames(pages, "pages", page)
    if tags.get(tiff.PHOTOMETRIC) == 2 and tags.get(tiff.SAMPLES, 3) > 3 and not transparent(image):
        yield "picture_channels", f"{tags[tiff.SAMPLES]} samples a pixel, of which red, green and blue are read"


def _channels(description: str) -> int:
    if description.startswith("ImageJ="):
        found = _IMAGEJ_CHANNELS.search(description)
    else:
        found = _OME_CHANNELS.search(description) if "<OME" in description else None
    return int(found[1]) if found else 1
