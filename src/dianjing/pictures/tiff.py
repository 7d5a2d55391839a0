"""The samples of a TIFF with more than 8 bits, exactly; Pillow keeps 8 bits of colours and refuses many layouts."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS = 273, 274, 277, 278, 279
MAX_VALUE, PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_COUNTS = 281, 284, 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, SIGNED_MIN, SIGNED_MAX, ICC_PROFILE = 338, 339, 340, 341, 34675
STRIPS, TILES = (STRIP_OFFSETS, STRIP_COUNTS), (TILE_OFFSETS, TILE_COUNTS)
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "zstd"}
"""Those whose samples can be of any depth."""
BYTES_AT_ONCE = 64 * 2**20
LONG = 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The samples of a page, by its tags."""

    width: int
    height: int
    bits: int
    samples: int
    signed: bool
    photometric: int
    extra: tuple[int, ...]
    """Meaning of each sample beyond the colours: 0 unknown, 1 premultiplied alpha, 2 alpha."""

    @property
    def colours(self) -> int:
        """How many samples are the colour."""
        return {0: 1, 1: 1, 2: 3, 5: 4}[self.photometric]


def layout_of(tags: Mapping[int, Any]) -> Layout | None:
    """Return the layout of a page whose samples are whole numbers of 9 to 16 bits, None for any other.

    Raises:
        ValueError: it has such samples, and they cannot be read; the message says why.
    """
    bits = set(_numbers(tags.get(BITS, 1)))
    formats = set(_numbers(tags.get(SAMPLE_FORMAT, 1)))
    if not bits or not 8 < max(bits) <= 16 or not formats <= {1, 2, 4}:
        return None
    compression = tags.get(COMPRESSION, 1)
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression {compression} with {max(bits)} bits a sample")
    if len(bits) > 1 or len(formats) > 1:
        raise ValueError("samples of several depths")
    layout = Layout(
        width=tags[WIDTH],
        height=tags[HEIGHT],
        bits=bits.pop(),
        samples=tags.get(SAMPLES, 1),
        signed=formats == {2},
        photometric=tags.get(PHOTOMETRIC, 1),
        extra=_numbers(tags.get(EXTRA_SAMPLES, ())),
    )
    if layout.photometric not in (0, 1, 2, 5) or layout.samples < layout.colours:
        raise ValueError(f"colours of kind {layout.photometric} with {layout.bits} bits a sample")
    if layout.samples > layout.colours + 1:
        raise ValueError(f"{layout.samples} bands; make three of them a picture")
    predictor = tags.get(PREDICTOR, 1)
    if predictor not in (1, 2) or (predictor == 2 and layout.bits < 16):
        raise ValueError(f"predictor {predictor} with {layout.bits} bits a sample")
    return layout


def read_samples(file: IO[bytes], tags: Mapping[int, Any], layout: Layout, big_endian: bool) -> NDArray[Any]:
    """Return the samples of a page, (height, width, samples), as uint16 or int16."""
    planes = layout.samples if tags.get(PLANAR, 1) == 2 else 1
    inner = layout.samples // planes
    read = [
        _unpacked(_rows(file, tags, layout, inner, plane, planes), tags, layout, inner, big_endian)
        for plane in range(planes)
    ]
    values = np.concatenate(read, axis=2) if planes > 1 else read[0]
    return values.view(np.int16) if layout.signed and layout.bits == 16 else values


def _rows(
    file: IO[bytes], tags: Mapping[int, Any], layout: Layout, inner: int, plane: int, planes: int
) -> NDArray[np.uint8]:
    """Return one plane's rows as bytes, decompressed: it is read as if each byte were a grey pixel."""
    tiled = TILE_OFFSETS in tags
    offsets, counts = (_numbers(tags[tag]) for tag in (TILES if tiled else STRIPS))
    segment_height = tags[TILE_HEIGHT] if tiled else min(tags.get(ROWS_PER_STRIP, layout.height), layout.height)
    across = -(-layout.width // tags[TILE_WIDTH]) if tiled else 1
    per_plane = len(offsets) // planes
    offsets, counts = (numbers[plane * per_plane : (plane + 1) * per_plane] for numbers in (offsets, counts))
    row_bytes = -(-layout.width * inner * layout.bits // 8)
    at_once = max(BYTES_AT_ONCE // (row_bytes * segment_height), 1)
    found: list[NDArray[np.uint8]] = []
    for top in range(0, -(-layout.height // segment_height), at_once):
        height = min(at_once * segment_height, layout.height - top * segment_height)
        chosen = slice(top * across, (top + at_once) * across)
        grey = {
            WIDTH: (row_bytes,),
            HEIGHT: (height,),
            BITS: (8,),
            COMPRESSION: (tags.get(COMPRESSION, 1),),
            PHOTOMETRIC: (1,),
            FILL_ORDER: (tags.get(FILL_ORDER, 1),),
            SAMPLES: (1,),
            PLANAR: (1,),
        }
        if tiled:
            grey |= {TILE_WIDTH: (tags[TILE_WIDTH] * inner * layout.bits // 8,), TILE_HEIGHT: (segment_height,)}
        else:
            grey |= {ROWS_PER_STRIP: (segment_height,)}
        segments = [_read(file, *one) for one in zip(offsets[chosen], counts[chosen], strict=True)]
        with Image.open(_written(grey, segments, tiled), formats=["TIFF"]) as image:
            found.append(np.asarray(image))
    return np.concatenate(found)


def _unpacked(
    rows: NDArray[np.uint8], tags: Mapping[int, Any], layout: Layout, inner: int, big_endian: bool
) -> NDArray[Any]:
    shape = layout.height, layout.width, inner
    if layout.bits == 16:
        values = rows.view(">u2" if big_endian else "<u2").astype(np.uint16).reshape(shape)
        if tags.get(PREDICTOR, 1) == 2:
            step = tags.get(TILE_WIDTH, layout.width)
            for left in range(0, layout.width, step):
                part = values[:, left : left + step]
                np.cumsum(part, axis=1, dtype=np.uint16, out=part)
        return values
    bits = np.unpackbits(rows, axis=1)[:, : layout.width * inner * layout.bits].reshape(*shape, layout.bits)
    values = np.zeros(shape, np.uint16)
    for place in range(layout.bits):
        values = values << 1 | bits[..., place]
    return values


def _read(file: IO[bytes], offset: int, count: int) -> bytes:
    file.seek(offset)
    data = file.read(count)
    if len(data) != count:
        raise OSError("image file is truncated")
    return data


def _written(tags: Mapping[int, tuple[int, ...]], segments: Sequence[bytes], tiled: bool) -> io.BytesIO:
    """Return a TIFF file in memory of one page with these tags and strips or tiles."""
    starts = [8 + sum(map(len, segments[:number])) for number in range(len(segments))]
    end = starts[-1] + len(segments[-1])
    where, sizes = TILES if tiled else STRIPS
    entries = {**tags, where: (*starts,), sizes: (*map(len, segments),)}
    lists, directory = b"", struct.pack("<H", len(entries))
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, lists = struct.pack("<I", end + len(lists)), lists + packed
        directory += struct.pack("<HHI", tag, LONG, len(numbers)) + packed
    header = struct.pack("<2sHI", b"II", 42, end + len(lists))
    return io.BytesIO(b"".join([header, *segments, lists, directory, bytes(4)]))


class TiffPicture(Image.Image):
    """An opened TIFF of a layout that Pillow refuses."""

    format = "TIFF"

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self.fp = file
        self.seek(0)

    def seek(self, frame: int) -> None:
        """Choose a page, counted from 0.

        Raises:
            EOFError: there is no such page.
        """
        self.fp.seek(0)
        header = self.fp.read(8)
        header += self.fp.read(8) if 43 in header[2:4] else b""
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(header)
        for _ in range(frame + 1):
            if not tags.next:
                raise EOFError
            self.fp.seek(tags.next)
            tags.load(self.fp)
        self.tag_v2 = tags
        self._size = tags[WIDTH], tags[HEIGHT]
        self._mode = "L"
        if tags.get(ICC_PROFILE):
            self.info["icc_profile"] = tags[ICC_PROFILE]

    def close(self) -> None:
        """Close the file."""
        self.fp.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_tiff(path: str) -> TiffPicture:
    """Return a TIFF that Pillow refuses, if its samples can be read.

    Raises:
        ValueError: they cannot; the message says why.
    """
    with ExitStack() as opened:
        image = TiffPicture(opened.enter_context(open(path, "rb")))
        if layout_of(image.tag_v2) is None:
            raise ValueError(f"{_in_words(image.tag_v2)}, which is not read")
        opened.pop_all()
        return image


def _in_words(tags: Mapping[int, Any]) -> str:
    bits = ", ".join(str(number) for number in sorted(set(_numbers(tags.get(BITS, 1)))))
    return f"{tags.get(SAMPLES, 1)} samples of {bits} bits (colours of kind {tags.get(PHOTOMETRIC, 1)})"


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
