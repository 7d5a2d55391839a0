"""Pictures with more than 8 bits a sample -> 8 bits, by the one white that is known of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dianjing.pictures import tiff
from dianjing.pictures.rule import PictureError, PictureRule

QUARTER = 4
"""A picture is scaled by its whole range, unasked, if it uses at least one part in QUARTER of it."""
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_J2K_SIZE = b"\xff\x4f\xff\x51"


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The header of a picture with more than 8 bits."""

    bits: int
    white: float = 0
    """The file's own; 0 = it names none."""
    black: float = 0
    named_by: str = ""
    """The part of the file that names the white, in the words of its format."""
    signed: bool = False
    layout: tiff.Layout | None = None

    @property
    def range(self) -> int:
        """The largest value that would fit."""
        return 2 ** (self.bits - self.signed) - 1


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A picture as its file holds it."""

    values: NDArray[Any]
    """(height, width, colours): 1 grey, 3 RGB, 4 CMYK."""
    depth: Depth
    alpha: NDArray[Any] | None = None
    premultiplied: bool = False
    inverted: bool = False
    """The white is 0 and black the largest value."""


def depth_of(image: Image.Image) -> Depth | None:
    """Return what an opened picture says of its depth, nothing decoded; None for one of 8 bits or fewer.

    Raises:
        ValueError: it is a TIFF of a layout that is not read; the message says what.
    """
    if image.format == "PNG" and _rawmode(image).endswith(";16B"):
        bits = _significant_bits(image)
        own = {"white": 2**bits - 1, "named_by": f"sBIT {bits}"} if bits < 16 else {}
        return Depth(bits=16, **own)
    if image.format == "TIFF":
        return _depth_of_tiff(image)
    if image.format == "PPM" and image.mode == "I":
        return Depth(bits=16, white=65535, named_by="its maxval")  # Pillow scales to it
    if image.format == "JPEG2000" and image.mode == "I;16":
        bits = _bits_of_jpeg2000(image)
        return Depth(bits=16, white=2**bits - 1, named_by=f"{bits} bits a sample") if bits < 16 else Depth(bits=16)
    return Depth(bits=16) if image.mode.startswith("I;16") else None


def samples_of(image: Image.Image, depth: Depth) -> Samples:
    """Return the samples of an opened picture."""
    if depth.layout:
        return _samples_of_tiff(image, depth, depth.layout)
    if image.format == "PNG":
        return _samples_of_png(image, depth)
    image.load()
    values = np.asarray(image).astype(np.uint16)
    if image.format == "JPEG2000" and depth.white:
        values >>= 16 - int(depth.white).bit_length()  # Pillow shifts them up
    return Samples(values=values[..., None], depth=depth)


def to_8_bits(samples: Samples, name: str, rule: PictureRule) -> Image.Image:
    """Return a picture as L, RGB or CMYK, or as LA or RGBA with its transparency.

    Raises:
        PictureError: nothing says which value is white, and most of the range is empty.
    """
    depth, colours = samples.depth, samples.values.shape[2]
    white = depth.white or rule.white or _whole_range(samples, name)
    bytes_ = _levels(samples.values, depth.black, white)
    if samples.inverted:
        bytes_ = 255 - bytes_
    if samples.alpha is None:
        return Image.fromarray(bytes_[..., 0] if colours == 1 else bytes_, MODES[colours])
    opaque = white if samples.alpha.max(initial=0) <= white else depth.range
    bytes_ = np.concatenate([bytes_, _levels(samples.alpha, 0, opaque)[..., None]], axis=2)
    mode = {1: "LA", 3: "RGBA"}[colours]
    if not samples.premultiplied:
        return Image.fromarray(bytes_, mode)
    return Image.fromarray(bytes_, {"LA": "La", "RGBA": "RGBa"}[mode]).convert(mode)


def brightest(samples: Samples) -> int:
    """Return the largest value of the colours, 0 where the file names its white."""
    return 0 if samples.depth.white else int(samples.values.max(initial=0))


def proposed_white(brightest: int) -> int:
    """Return the white of a data set whose pictures go up to `brightest`: that of the next depth in bits."""
    return 2 ** max(brightest.bit_length(), 8) - 1


def _whole_range(samples: Samples, name: str) -> int:
    """Return the largest value that fits the file, if its picture makes use of it."""
    lowest, highest = int(samples.values.min(initial=0)), int(samples.values.max(initial=0))
    whole = samples.depth.range
    if samples.values.shape[2] == 4 or (lowest >= 0 and (highest == 0 or highest > whole // QUARTER)):
        return whole
    spread = f"from {lowest} to {highest}" if lowest < 0 else f"only up to {highest}"
    raise PictureError(
        "picture_white",
        name,
        f"its values of {samples.depth.bits} bits go {spread} of {whole}, and the file does not say which one is "
        f"white; if this is the brightest picture, set data.white = {proposed_white(highest)}"
        + (", and values below 0 become black" if lowest < 0 else "")
        + " (`dianjing check` looks at all pictures and proposes it)",
    )


def _levels(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    """Return 0 for `black` and what is below, 255 for `white` and what is above, in between the nearest level."""
    if values.dtype.itemsize == 2:
        every = np.arange(65536, dtype=np.uint16).view(values.dtype)
        return _nearest(every, black, white)[values.view(np.uint16)]
    return _nearest(values, black, white)


def _nearest(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    if white <= black:  # a window without width is a threshold
        return np.where(values > black, 255, 0).astype(np.uint8)
    scaled = (values.astype(np.float64) - black) * 255 / (white - black)
    return np.floor(scaled.clip(0, 255) + 0.5).astype(np.uint8)


def _samples_of_png(image: Image.Image, depth: Depth) -> Samples:
    key = image.info.get("transparency")
    rawmode = _rawmode(image)
    if rawmode == "I;16B":
        image.load()
        values = np.asarray(image).astype(np.uint16)[..., None]
    elif rawmode == "LA;16B":
        quarters = _decoded(image, "RGBA").astype(np.uint16)  # grey and alpha, two bytes each
        values = quarters[..., 0::2] << 8 | quarters[..., 1::2]
    else:  # Pillow keeps one byte of two: the first of big-endian samples, or the second when it is said otherwise
        low = _decoded(image, rawmode.replace("16B", "16L")).astype(np.uint16)
        values = _decoded(image, rawmode).astype(np.uint16) << 8 | low
    alpha = None
    if values.shape[2] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1]
    elif key is not None:
        alpha = np.where((values == np.asarray(key, np.uint16)).all(axis=2), 0, depth.range).astype(np.uint16)
    if depth.white and _scaled_up(values, int(depth.white).bit_length()):
        depth = Depth(bits=16, white=65535, named_by=depth.named_by)
    return Samples(values=values, depth=depth, alpha=alpha)


def _decoded(image: Image.Image, rawmode: str) -> NDArray[np.uint8]:
    """Return a PNG's pixels, its bytes taken for samples of another kind."""
    file = _file(image)
    file.seek(0)
    with Image.open(file, formats=["PNG"]) as again:
        again.tile = [again.tile[0]._replace(args=rawmode)]
        again.load()
        return np.asarray(again)


def _scaled_up(values: NDArray[Any], bits: int) -> bool:
    """Return whether samples of `bits` bits were spread over all 16, as the standard has it, not stored as they are.

    The low bits are then zero, or repeat the high ones.
    """
    high = values >> (16 - bits)
    spread = np.abs(high * (65535 / (2**bits - 1)) - values) < 1
    return bool(values.max(initial=0) >= 2**bits or spread.all() or (high << (16 - bits) == values).all())


def _rawmode(image: Image.Image) -> str:
    """Return how a PNG's bytes are laid out, in Pillow's words; "" once it is decoded."""
    tiles: Any = getattr(image, "tile", ())
    return str(tiles[0].args) if tiles else ""


def _file(image: Image.Image) -> IO[bytes]:
    return getattr(image, "fp")  # noqa: B009  the type of an image that was not opened does not have it


def _significant_bits(image: Image.Image) -> int:
    """Return the largest number of a PNG's sBIT chunk, 16 without one."""
    file = _file(image)
    place = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"sBIT" and 0 < length <= 4:
                return min(max(file.read(length)), 16) or 16
            if kind in (b"IDAT", b"IEND"):
                break
            file.seek(length + 4, 1)
    finally:
        file.seek(place)
    return 16


def _bits_of_jpeg2000(image: Image.Image) -> int:
    file = _file(image)
    place = file.tell()
    file.seek(0)
    start = file.read(65536)
    file.seek(place)
    at = start.find(_J2K_SIZE)
    # After marker and length: capabilities, eight sizes and offsets of four bytes, the number of components, its depth.
    return (start[at + 42] & 0x7F) + 1 if 0 <= at < len(start) - 42 else 16


def _depth_of_tiff(image: Image.Image) -> Depth | None:
    tags: Any = getattr(image, "tag_v2")  # noqa: B009  Pillow's type does not have it
    layout = tiff.layout_of(tags)
    if layout is None:
        return None
    white, black, named_by = 0.0, 0.0, ""
    if layout.bits < 16:
        white, named_by = float(2**layout.bits - 1), f"BitsPerSample {layout.bits}"
    for tag, of in ((tiff.MAX_VALUE, "MaxSampleValue"), (tiff.SIGNED_MAX, "SMaxSampleValue")):
        if tag in tags:
            named = tags[tag]
            white = float(max(named) if isinstance(named, tuple) else named)
            named_by = f"{of} {white:g}"
    if layout.signed and white and tiff.SIGNED_MIN in tags:
        lowest = tags[tiff.SIGNED_MIN]
        black = float(min(lowest) if isinstance(lowest, tuple) else lowest)
    return Depth(bits=16, white=white, black=black, named_by=named_by, signed=layout.signed, layout=layout)


def _samples_of_tiff(image: Image.Image, depth: Depth, layout: tiff.Layout) -> Samples:
    tags: Any = getattr(image, "tag_v2")  # noqa: B009
    values = tiff.read_samples(_file(image), tags, layout, tags.prefix == b"MM")
    extra = layout.extra[0] if layout.extra and layout.samples > layout.colours else 0
    return Samples(
        values=values[..., : layout.colours],
        depth=depth,
        alpha=values[..., layout.colours] if extra in (1, 2) else None,
        premultiplied=extra == 1,
        inverted=layout.photometric == 0,
    )
