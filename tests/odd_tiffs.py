"""Odd TIFF files, each with the pixels that are right; imported, they join ODD."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.odd_pictures import ODD, TWELVE, WHOLE, display_p3, grey, half_alpha, odd, on_white, ramp, scaled, through

__all__ = ["ODD"]
pytest.importorskip("imagecodecs", reason="the odd pictures are written by tifffile and imagecodecs")
tifffile = pytest.importorskip("tifffile", reason="the odd pictures are written by tifffile")


def tiff(path: Path, values: np.ndarray, **options: Any) -> None:
    tifffile.imwrite(path, values, **{"metadata": None, "photometric": "minisblack", **options})


def number(code: int, value: int) -> tuple[int, str, int, int, bool]:
    """Return a tag of one whole number, as tifffile takes it."""
    return code, "H", 1, value, True


TIFFS: list[tuple[str, str, int, dict[str, Any]]] = [
    ("grey16", "grey", 0, {}),
    ("grey16_big", "grey, big-endian", 0, {"byteorder": ">"}),
    ("grey16_lzw", "grey, LZW, predictor", 0, {"compression": "lzw", "predictor": True}),
    ("grey16_zstd", "grey, zstd, tiles", 0, {"compression": "zstd", "tile": (16, 32)}),
    ("grey16_deflate_big", "grey, deflate, big-endian", 0, {"compression": "zlib", "byteorder": ">"}),
    ("rgb16", "RGB", 3, {"photometric": "rgb"}),
    ("rgb16_big", "RGB, big-endian", 3, {"photometric": "rgb", "byteorder": ">"}),
    ("rgb16_strips", "RGB, strips of 7 rows", 3, {"photometric": "rgb", "rowsperstrip": 7}),
    ("rgb16_lzw", "RGB, LZW, predictor", 3, {"photometric": "rgb", "compression": "lzw", "predictor": True}),
    (
        "rgb16_tiles",
        "RGB, deflate, predictor, tiles",
        3,
        {"photometric": "rgb", "compression": "zlib", "predictor": True, "tile": (16, 16)},
    ),
    ("rgb16_bigtiff", "RGB, BigTIFF", 3, {"photometric": "rgb", "bigtiff": True}),
]
for stem, words, channels, options in TIFFS:

    @odd(
        f"{stem}.tif",
        f"TIFF, 16 bits, {words}",
        lambda channels=channels: scaled(ramp(WHOLE, 3), WHOLE) if channels else grey(scaled(ramp(WHOLE), WHOLE)),
    )
    def _(path: Path, channels: int = channels, options: dict[str, Any] = options) -> None:
        tiff(path, ramp(WHOLE, channels), **options)


for stem, words, options in (
    ("planar16", "RGB, planar", {}),
    ("planar16_big", "RGB, planar, big-endian", {"byteorder": ">"}),
    ("planar16_lzw", "RGB, planar, LZW", {"compression": "lzw", "predictor": True}),
    ("planar16_tiles", "RGB, planar, tiles", {"tile": (16, 16), "compression": "zlib"}),
):

    @odd(f"{stem}.tif", f"TIFF, 16 bits, {words}", lambda: scaled(ramp(WHOLE, 3), WHOLE))
    def _(path: Path, options: dict[str, Any] = options) -> None:
        planes = np.ascontiguousarray(ramp(WHOLE, 3).transpose(2, 0, 1))
        tiff(path, planes, photometric="rgb", planarconfig="separate", **options)


@odd("white_is_zero16.tif", "TIFF, 16 bits, WhiteIsZero", lambda: 255 - grey(scaled(ramp(WHOLE), WHOLE)))
def _(path: Path) -> None:
    tiff(path, ramp(WHOLE), photometric="miniswhite")


@odd(
    "white_is_zero16_big.tif",
    "TIFF, 16 bits, WhiteIsZero, big-endian",
    lambda: 255 - grey(scaled(ramp(WHOLE), WHOLE)),
)
def _(path: Path) -> None:
    tiff(path, ramp(WHOLE), photometric="miniswhite", byteorder=">")


@odd(
    "white_is_zero12.tif",
    "TIFF, 12 bits in 16, WhiteIsZero",
    lambda: 255 - grey(scaled(ramp(TWELVE), TWELVE)),
    white=TWELVE,
)
def _(path: Path) -> None:
    tiff(path, ramp(TWELVE), photometric="miniswhite")


@odd("white_is_zero8.tif", "TIFF, 8 bits, WhiteIsZero", lambda: 255 - grey(ramp(255).astype(np.uint8)))
def _(path: Path) -> None:
    tiff(path, ramp(255).astype(np.uint8), photometric="miniswhite")


@odd("max_sample.tif", "TIFF, 12 bits in 16, MaxSampleValue", lambda: grey(scaled(ramp(TWELVE), TWELVE)))
def _(path: Path) -> None:
    tiff(path, ramp(TWELVE), extratags=[number(281, TWELVE)])


@odd("max_sample_rgb.tif", "TIFF, 12 bits in 16, MaxSampleValue, RGB", lambda: scaled(ramp(TWELVE, 3), TWELVE))
def _(path: Path) -> None:
    tiff(path, ramp(TWELVE, 3), photometric="rgb", extratags=[(281, "H", 3, (TWELVE,) * 3, True)])


for bits in (10, 12, 14):

    @odd(
        f"packed{bits}.tif",
        f"TIFF, {bits} bits packed, grey",
        lambda bits=bits: grey(scaled(ramp(2**bits - 1), 2**bits - 1)),
    )
    def _(path: Path, bits: int = bits) -> None:
        tiff(path, ramp(2**bits - 1), bitspersample=bits)


@odd("packed12_rgb.tif", "TIFF, 12 bits packed, RGB", lambda: scaled(ramp(TWELVE, 3), TWELVE))
def _(path: Path) -> None:
    tiff(path, ramp(TWELVE, 3), photometric="rgb", bitspersample=12)


@odd("sentinel.tif", "TIFF, reflectances up to 10,000, RGB", lambda: scaled(ramp(10_000, 3), 10_000), white=10_000)
def _(path: Path) -> None:
    tiff(path, ramp(10_000, 3), photometric="rgb")


@odd("signed16.tif", "TIFF, 16 bits signed", lambda: grey(scaled(ramp(32767), 32767)))
def _(path: Path) -> None:
    tiff(path, ramp(32767).astype(np.int16))


@odd(
    "signed16_below.tif",
    "TIFF, 16 bits signed, values below 0",
    lambda: grey(scaled(ramp(4000).astype(np.int16) - 1000, 3000)),
    white=3000,
)
def _(path: Path) -> None:
    tiff(path, ramp(4000).astype(np.int16) - 1000)


def four() -> np.ndarray:
    return np.dstack([ramp(WHOLE, 3), ramp(WHOLE, seed=9)])


@odd("four16.tif", "TIFF, 16 bits, RGB and infrared", lambda: scaled(ramp(WHOLE, 3), WHOLE))
def _(path: Path) -> None:
    tiff(path, four(), photometric="rgb", extrasamples=["unspecified"])


def without_tag(path: Path, code: int) -> None:
    """Take a tag out of the first page of a little-endian TIFF."""
    raw = bytearray(path.read_bytes())
    start = struct.unpack_from("<I", raw, 4)[0]
    entries = struct.unpack_from("<H", raw, start)[0]
    kept = [bytes(raw[start + 2 + 12 * i : start + 14 + 12 * i]) for i in range(entries)]
    kept = [entry for entry in kept if struct.unpack_from("<H", entry)[0] != code]
    assert len(kept) == entries - 1
    raw[4:8] = struct.pack("<I", len(raw))
    path.write_bytes(bytes(raw) + struct.pack("<H", len(kept)) + b"".join(kept) + bytes(4))


@odd("four16_bare.tif", "TIFF, 16 bits, four samples, ExtraSamples missing", lambda: scaled(ramp(WHOLE, 3), WHOLE))
def _(path: Path) -> None:
    tiff(path, four(), photometric="rgb", extrasamples=["unspecified"])
    without_tag(path, 338)


@odd("four8_bare.tif", "TIFF, 8 bits, four samples, ExtraSamples missing", lambda: ramp(255, 3).astype(np.uint8))
def _(path: Path) -> None:
    tiff(path, np.dstack([ramp(255, 3), ramp(255)]).astype(np.uint8), photometric="rgb", extrasamples=["unspecified"])
    without_tag(path, 338)


@odd(
    "rgba16.tif",
    "TIFF, 16 bits, RGB and alpha",
    lambda: on_white(scaled(ramp(WHOLE, 3), WHOLE), scaled(half_alpha(WHOLE), WHOLE)),
    within=1,
)
def _(path: Path) -> None:
    tiff(path, np.dstack([ramp(WHOLE, 3), half_alpha(WHOLE)]), photometric="rgb", extrasamples=["unassalpha"])


@odd(
    "la16.tif",
    "TIFF, 16 bits, grey and alpha",
    lambda: on_white(grey(scaled(ramp(WHOLE), WHOLE)), scaled(half_alpha(WHOLE), WHOLE)),
    within=1,
)
def _(path: Path) -> None:
    tiff(path, np.dstack([ramp(WHOLE), half_alpha(WHOLE)]), extrasamples=["unassalpha"], planarconfig="contig")


def ink() -> np.ndarray:
    return ramp(WHOLE, 4)


def cmyk_truth(levels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(levels, "CMYK").convert("RGB"))


@odd("cmyk16.tif", "TIFF, 16 bits, CMYK", lambda: cmyk_truth(scaled(ink(), WHOLE)))
def _(path: Path) -> None:
    tiff(path, ink(), photometric="separated")


ORIENTED: list[tuple[str, Callable[[], np.ndarray], Callable[[], np.ndarray], dict[str, Any]]] = [
    ("grey8", lambda: ramp(255).astype(np.uint8), lambda: grey(ramp(255).astype(np.uint8)), {}),
    ("grey16", lambda: ramp(WHOLE), lambda: grey(scaled(ramp(WHOLE), WHOLE)), {}),
    ("rgb16", lambda: ramp(WHOLE, 3), lambda: scaled(ramp(WHOLE, 3), WHOLE), {"photometric": "rgb"}),
    (
        "cmyk8",
        lambda: ramp(255, 4).astype(np.uint8),
        lambda: cmyk_truth(ramp(255, 4).astype(np.uint8)),
        {"photometric": "separated"},
    ),
    (
        "rgba8",
        lambda: np.dstack([ramp(255, 3), half_alpha(255)]).astype(np.uint8),
        lambda: on_white(ramp(255, 3).astype(np.uint8), half_alpha(255)),
        {"photometric": "rgb", "extrasamples": ["unassalpha"]},
    ),
]
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    3: lambda image: image[::-1, ::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    8: lambda image: np.rot90(image, 1),
}
for stem, stored, truth, options in ORIENTED:
    for lies, turn in TURNS.items():

        @odd(
            f"lying{lies}_{stem}.tif",
            f"TIFF, uncompressed, {stem}, orientation {lies}",
            lambda truth=truth, turn=turn: turn(truth()),
            within=stem == "rgba8",
        )
        def _(path: Path, stored: Any = stored, lies: int = lies, options: dict[str, Any] = options) -> None:
            tiff(path, stored(), extratags=[number(274, lies)], **options)


@odd(
    "p3_rgb16.tif",
    "TIFF, 16 bits, profile Display P3",
    lambda: through(display_p3(), Image.fromarray(scaled(ramp(WHOLE, 3), WHOLE))),
)
def _(path: Path) -> None:
    tiff(path, ramp(WHOLE, 3), photometric="rgb", iccprofile=display_p3())
