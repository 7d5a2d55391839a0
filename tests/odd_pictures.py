"""Pictures as clinics, laboratories, phones and printers write them, each with the pixels that are right."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 40, 56
TWELVE, WHOLE = 4095, 65535


def ramp(white: int, channels: int = 0, seed: int = 0) -> np.ndarray:
    """Return uint16 values from 0 to `white`, smooth with some grain, in `channels` channels."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : HEIGHT - 1 : HEIGHT * 1j, 0 : WIDTH - 1 : WIDTH * 1j]
    planes = []
    for number in range(channels or 1):
        wave = np.sin(rows / (7 + number)) + np.cos(columns / (5 + 2 * number)) + rng.normal(0, 0.03, rows.shape)
        wave = (wave - wave.min()) / (wave.max() - wave.min())
        planes.append(np.round(wave * white).astype(np.uint16))
    return np.stack(planes, axis=2) if channels else planes[0]


def grey(levels: np.ndarray) -> np.ndarray:
    """Return grey levels as RGB."""
    return np.repeat(levels[..., None], 3, axis=2)


def scaled(values: np.ndarray, white: float, black: float = 0) -> np.ndarray:
    """Return 8-bit levels, computed with whole and half numbers alone."""
    exact = (values.astype(np.float64) - black) / (white - black) * 255
    return np.floor(np.clip(exact, 0, 255) + 0.5).astype(np.uint8)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return colours laid on white."""
    share = alpha[..., None].astype(np.float64) / 255
    return np.round(rgb * share + 255 * (1 - share)).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Odd:
    """One odd picture."""

    name: str
    kind: str
    """What it is, as the table of docs/pictures.md says it."""
    write: Callable[[Path], None]
    truth: Callable[[], np.ndarray]
    """(height, width, 3) levels."""
    white: int = 0
    """data.white that it is read with."""
    within: int = 0
    """Levels that a resampling, a colour profile or transparency in between may make of difference."""
    needs: str = ""
    """The package that reads it."""


ODD: dict[str, Odd] = {}


def odd(name: str, kind: str, truth: Callable[[], np.ndarray], **more: Any) -> Callable[[Any], Any]:
    """Add a picture to ODD; the function writes it."""

    def add(write: Callable[[Path], None]) -> Callable[[Path], None]:
        ODD[name] = Odd(name=name, kind=kind, write=write, truth=truth, **more)
        return write

    return add


def png_chunks(path: Path, *added: tuple[bytes, bytes]) -> None:
    """Put chunks into a PNG, after its header."""
    raw = path.read_bytes()
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in added
    )
    path.write_bytes(raw[:33] + chunks + raw[33:])


def write_png(path: Path, values: np.ndarray, interlaced: bool = False) -> None:
    """Write a PNG of 16 bits with 1 to 4 channels, unfiltered."""
    values = values if values.ndim == 3 else values[..., None]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]

    def rows(part: np.ndarray) -> bytes:
        return b"".join(b"\0" + row.astype(">u2").tobytes() for row in part if part.shape[1])

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[top::down, left::right] for top, left, down, right in passes] if interlaced else [values]
    data = zlib.compress(b"".join(map(rows, parts)))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, interlaced)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, body in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        with path.open("ab") as file:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))


# PNG of 16 bits.


@odd("grey16.png", "PNG, 16 bits, grey", lambda: grey(scaled(ramp(WHOLE), WHOLE)))
def _(path: Path) -> None:
    write_png(path, ramp(WHOLE))


@odd("rgb16.png", "PNG, 16 bits, RGB", lambda: scaled(ramp(WHOLE, 3), WHOLE))
def _(path: Path) -> None:
    write_png(path, ramp(WHOLE, 3))


@odd("rgb16_interlaced.png", "PNG, 16 bits, RGB, interlaced", lambda: scaled(ramp(WHOLE, 3), WHOLE))
def _(path: Path) -> None:
    write_png(path, ramp(WHOLE, 3), interlaced=True)


@odd("grey12.png", "PNG, 12 bits in 16, grey", lambda: grey(scaled(ramp(TWELVE), TWELVE)), white=TWELVE)
def _(path: Path) -> None:
    write_png(path, ramp(TWELVE))


@odd("rgb12.png", "PNG, 12 bits in 16, RGB", lambda: scaled(ramp(TWELVE, 3), TWELVE), white=TWELVE)
def _(path: Path) -> None:
    write_png(path, ramp(TWELVE, 3))


@odd("sbit.png", "PNG, 12 bits in 16, sBIT", lambda: grey(scaled(ramp(TWELVE), TWELVE)))
def _(path: Path) -> None:
    write_png(path, ramp(TWELVE))
    png_chunks(path, (b"sBIT", b"\x0c"))


@odd("sbit_rgb.png", "PNG, 10 bits in 16, sBIT, RGB", lambda: scaled(ramp(1023, 3), 1023))
def _(path: Path) -> None:
    write_png(path, ramp(1023, 3))
    png_chunks(path, (b"sBIT", b"\x0a\x0a\x0a"))


@odd("sbit_spread.png", "PNG, 12 bits spread over 16, sBIT", lambda: grey(scaled(ramp(TWELVE), TWELVE)))
def _(path: Path) -> None:
    values = ramp(TWELVE)
    write_png(path, values << 4 | values >> 8)
    png_chunks(path, (b"sBIT", b"\x0c"))


def half_alpha(white: int) -> np.ndarray:
    return ramp(white, seed=5)


@odd(
    "la16.png",
    "PNG, 16 bits, grey and alpha",
    lambda: on_white(grey(scaled(ramp(WHOLE), WHOLE)), scaled(half_alpha(WHOLE), WHOLE)),
    within=1,
)
def _(path: Path) -> None:
    write_png(path, np.dstack([ramp(WHOLE), half_alpha(WHOLE)]))


@odd(
    "rgba16.png",
    "PNG, 16 bits, RGB and alpha",
    lambda: on_white(scaled(ramp(WHOLE, 3), WHOLE), scaled(half_alpha(WHOLE), WHOLE)),
    within=1,
)
def _(path: Path) -> None:
    write_png(path, np.dstack([ramp(WHOLE, 3), half_alpha(WHOLE)]))


def keyed() -> np.ndarray:
    values = ramp(WHOLE)
    values[:20, :20] = 1234
    return values


def keyed_truth() -> np.ndarray:
    levels = scaled(keyed(), WHOLE)
    levels[keyed() == 1234] = 255
    return grey(levels)


@odd("trns16.png", "PNG, 16 bits, one grey transparent (tRNS)", keyed_truth)
def _(path: Path) -> None:
    write_png(path, keyed())
    png_chunks(path, (b"tRNS", struct.pack(">H", 1234)))


def keyed_rgb() -> np.ndarray:
    values = ramp(WHOLE, 3)
    values[:20, :20] = 1234, 999, 40_000
    return values


def keyed_rgb_truth() -> np.ndarray:
    levels = scaled(keyed_rgb(), WHOLE)
    levels[(keyed_rgb() == (1234, 999, 40_000)).all(axis=2)] = 255
    return levels


@odd("trns16_rgb.png", "PNG, 16 bits, one colour transparent (tRNS)", keyed_rgb_truth)
def _(path: Path) -> None:
    write_png(path, keyed_rgb())
    png_chunks(path, (b"tRNS", struct.pack(">HHH", 1234, 999, 40_000)))


# Other formats.


@odd("lying.jpg", "JPEG, EXIF orientation 6", lambda: np.rot90(ramp(255, 3).astype(np.uint8), -1), within=12)
def _(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(ramp(255, 3).astype(np.uint8)).save(path, exif=exif, quality=98, subsampling=0)


@odd("lossless.avif", "AVIF, lossless", lambda: grey(ramp(255).astype(np.uint8)), within=1)
def _(path: Path) -> None:
    Image.fromarray(grey(ramp(255).astype(np.uint8))).save(path, quality=100, subsampling="4:4:4")


@odd("rgb8.jp2", "JPEG 2000, lossless", lambda: ramp(255, 3).astype(np.uint8))
def _(path: Path) -> None:
    Image.fromarray(ramp(255, 3).astype(np.uint8)).save(path, irreversible=False)


@odd("grey16.jp2", "JPEG 2000, 16 bits, grey", lambda: grey(scaled(ramp(WHOLE), WHOLE)))
def _(path: Path) -> None:
    Image.fromarray(ramp(WHOLE)).save(path, irreversible=False)


@odd("grey12.jp2", "JPEG 2000, 12 bits, grey", lambda: grey(scaled(ramp(TWELVE), TWELVE)))
def _(path: Path) -> None:
    import imagecodecs

    path.write_bytes(imagecodecs.jpeg2k_encode(ramp(TWELVE), level=0, bitspersample=12, codecformat="jp2"))


@odd("grey16.pgm", "PPM, 16 bits, grey", lambda: grey(scaled(ramp(WHOLE), WHOLE)))
def _(path: Path) -> None:
    path.write_bytes(b"P5\n%d %d\n65535\n" % (WIDTH, HEIGHT) + ramp(WHOLE).astype(">u2").tobytes())


@odd("grey12.pgm", "PPM, 12 bits (its maxval), grey", lambda: grey(scaled(ramp(TWELVE), TWELVE)), within=1)
def _(path: Path) -> None:
    path.write_bytes(b"P5\n%d %d\n4095\n" % (WIDTH, HEIGHT) + ramp(TWELVE).astype(">u2").tobytes())


@odd("rgb8.ppm", "PPM, 8 bits, RGB", lambda: ramp(255, 3).astype(np.uint8))
def _(path: Path) -> None:
    Image.fromarray(ramp(255, 3).astype(np.uint8)).save(path)


def heif_truth() -> np.ndarray:
    return grey(ramp(255).astype(np.uint8))


@odd("phone.heic", "HEIC", heif_truth, within=3, needs="pillow_heif")
def _(path: Path) -> None:
    import pillow_heif

    pillow_heif.from_pillow(Image.fromarray(heif_truth())).save(path, quality=-1)


@odd("lying.heic", "HEIC, lying", lambda: np.rot90(heif_truth(), -1), within=3, needs="pillow_heif")
def _(path: Path) -> None:
    import pillow_heif

    exif = Image.Exif()
    exif[274] = 6
    pillow_heif.register_heif_opener()
    Image.fromarray(heif_truth()).save(path, format="HEIF", quality=-1, exif=exif.tobytes())


# Colour profiles; the truth is littleCMS itself.


def display_p3() -> bytes:
    """Return a profile with wider colours than sRGB's: sRGB's own with red and green moved."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    moved = {b"rXYZ": (0.5151, 0.2412, -0.0011), b"gXYZ": (0.2920, 0.6922, 0.0419), b"bXYZ": (0.1571, 0.0666, 0.7841)}
    for number_of_tag in range(struct.unpack_from(">I", raw, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", raw, 132 + 12 * number_of_tag)
        if name in moved:
            struct.pack_into(">iii", raw, offset + 8, *(round(value * 65536) for value in moved[name]))
    raw[84:100] = bytes(16)
    return bytes(raw)


def through(profile: bytes, image: Image.Image) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert shown
    return np.asarray(shown)


def eight(channels: int = 3) -> np.ndarray:
    return ramp(255, channels).astype(np.uint8)


@odd("p3.png", "PNG, profile Display P3", lambda: through(display_p3(), Image.fromarray(eight())))
def _(path: Path) -> None:
    Image.fromarray(eight()).save(path, icc_profile=display_p3())


@odd("srgb.png", "PNG, profile sRGB", lambda: eight())
def _(path: Path) -> None:
    Image.fromarray(eight()).save(path, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())


@odd(
    "p3_alpha.png",
    "PNG, alpha, profile Display P3",
    lambda: on_white(through(display_p3(), Image.fromarray(eight())), half_alpha(255)),
    within=1,
)
def _(path: Path) -> None:
    pixels = np.dstack([eight(), half_alpha(255).astype(np.uint8)])
    Image.fromarray(pixels).save(path, icc_profile=display_p3())


@odd(
    "p3_grey.png",
    "PNG, grey with a profile for colours",
    lambda: through(display_p3(), Image.fromarray(grey(eight(0)))),
)
def _(path: Path) -> None:
    Image.fromarray(eight(0)).save(path, icc_profile=display_p3())
