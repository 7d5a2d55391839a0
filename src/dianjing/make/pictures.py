"""A folder or a list file -> the pictures in it: safely opened, hashed, and made small for sending."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from dianjing.errors import DataError
from dianjing.pictures.picture import SUFFIXES as SUFFIXES_OF
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PictureRule

SUFFIXES = tuple(suffix for suffixes in SUFFIXES_OF.values() for suffix in suffixes)
JPEG_QUALITY = 92
FULL_COLOUR = 0
"""Pillow's number for 4:4:4: the colour is not halved, which would show at the edges of drawings and letters."""
LOSSLESS_BYTES = 256 * 1024
"""A picture that need not shrink is sent as PNG if that is not larger."""
SUFFIXES_NAMED = 6
NEAR = 3
"""Most bits, of 64, in which the dHashes of near-duplicates differ."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture that can be opened."""

    name: str
    """Its path relative to the image folder, with "/"."""
    sha256: str
    """Of its file."""
    dhash: int
    size: tuple[int, int]
    """Width and height in pixels, upright."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The contents of a folder or a list; each name stands in one of the three."""

    root: str
    kept: tuple[Picture, ...]
    """In the order of their names."""
    refused: dict[str, str]
    """Name -> why it cannot be used; the reason says the name, too."""
    duplicates: dict[str, str]
    """Name -> the first picture with the same content, which is asked about instead."""
    other_files: Counter[str]
    """Suffix -> files of a folder that have it, which is none of a picture."""


def find_pictures(images: Path) -> tuple[str, list[str], Counter[str]]:
    """Return the image folder, the names in it, and the suffixes of the other files, which were left alone.

    A list file names one picture a line, relative to the folder the list lies in. `images` may be one picture, too.

    Raises:
        DataError: there is no such folder or list, or nothing in it.
    """
    others = Counter[str]()
    if images.is_dir():
        root, names = images, list[str]()
        for folder, inner, found in os.walk(images):
            # A linked folder is not entered: it may lead out of the image folder, or in circles.
            inner[:] = [one for one in inner if one != "__MACOSX" and not os.path.islink(os.path.join(folder, one))]
            for name in found:
                path = os.path.relpath(os.path.join(folder, name), images).replace(os.sep, "/")
                if name.startswith("._"):  # what a foreign disk cannot hold of a.png
                    others["of macOS (._)"] += 1
                elif name.lower().endswith(SUFFIXES):
                    names.append(path)
                else:
                    others[os.path.splitext(name)[1].lower() or "without an ending"] += 1
    elif images.is_file() and images.name.lower().endswith(SUFFIXES):
        root, names = images.parent, [images.name]
    elif images.is_file():
        root = images.parent
        try:
            lines = images.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{images}: not a folder, a picture or a UTF-8 list of pictures, one a line") from None
        names = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    else:
        raise DataError(f"{images}: no such folder of pictures, and no such picture or list file")
    if not names:
        there = f"; there are {named(others)}" if others else ""
        raise DataError(
            f"{images}: there is no picture in it ({', '.join(SUFFIXES)}){there}; give the folder they lie in"
        )
    return str(root), sorted(names), others


def named(suffixes: Counter[str]) -> str:
    """Return in words how many files of which suffixes there are."""
    return ", ".join(f"{number:,} {suffix}" for suffix, number in suffixes.most_common(SUFFIXES_NAMED))


def look(images: Path, white: int = 0, advance: Callable[[int, int], None] = lambda done, total: None) -> Pictures:
    """Open every picture once and return what can be used; `advance` hears how far it is.

    `white` is the value that is white in pictures of more than 8 bits which name none.
    """
    root, names, others = find_pictures(images)
    kept: list[Picture] = []
    refused: dict[str, str] = {}
    duplicates: dict[str, str] = {}
    first: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(lambda name: look_at(root, name, white), names), 1):
            if isinstance(found, str):
                refused[_printable(names[done - 1])] = found
            elif found.sha256 in first:
                duplicates[found.name] = first[found.sha256]
            else:
                first[found.sha256] = found.name
                kept.append(found)
            advance(done, len(names))
    return Pictures(root=root, kept=tuple(kept), refused=refused, duplicates=duplicates, other_files=others)


def look_at(root: str, name: str, white: int = 0) -> Picture | str:
    """Return one picture of a folder, or why it cannot be used."""
    if _printable(name) != name:
        return f'picture "{_printable(name)}": its name is not UTF-8, which a data file cannot hold; rename it'
    try:
        image = load_image(root, name, PictureRule(white=white))
        with open(os.path.join(root, name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (DataError, OSError) as error:
        return str(error)
    return Picture(name=name, sha256=digest, dhash=dhash(image), size=image.size)


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()


def dhash(image: Image.Image) -> int:
    """Return 64 bits that say where brightness falls from left to right, which small changes leave as they are."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    pixels = small.tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits << 1 | (pixels[9 * row + column] > pixels[9 * row + column + 1])
    return bits


def near_duplicates(hashes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return groups of two and more indices whose hashes are near, directly or by way of others.

    Two hashes with at most NEAR unlike bits agree in at least one of NEAR + 1 bands, so only those are compared.
    """
    group = list(range(len(hashes)))

    def find(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    same: dict[int, list[int]] = defaultdict(list)
    for i, value in enumerate(hashes):
        same[value].append(i)
        group[i] = same[value][0]
    width = 64 // (NEAR + 1)
    for band in range(NEAR + 1):
        alike: dict[int, list[int]] = defaultdict(list)
        for value in same:
            alike[value >> band * width & (1 << width) - 1].append(value)
        for a, b in (pair for values in alike.values() for pair in combinations(values, 2)):
            if (a ^ b).bit_count() <= NEAR:
                low, high = sorted((find(same[a][0]), find(same[b][0])))
                group[high] = low
    return _groups(find(i) for i in range(len(hashes)))


def _groups(roots: Iterable[int]) -> list[tuple[int, ...]]:
    members: dict[int, list[int]] = defaultdict(list)
    for i, root in enumerate(roots):
        members[root].append(i)
    return [tuple(group) for group in members.values() if len(group) > 1]


def sent_size(size: tuple[int, int], long_edge: int) -> tuple[int, int]:
    """Return width and height of a picture as it is sent: never enlarged."""
    scale = min(1.0, long_edge / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def data_uri(root: str, name: str, long_edge: int, white: int = 0) -> str:
    """Return a picture as a `data:` URI whose longer side is at most `long_edge` pixels: PNG if it is small, else JPEG.

    Raises:
        DataError: the picture can no longer be opened.
    """
    image = load_image(root, name, PictureRule(white=white))
    size = sent_size(image.size, long_edge)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif len(data := _saved(image, "PNG")) <= LOSSLESS_BYTES:
        return "data:image/png;base64," + base64.b64encode(data).decode()
    data = _saved(image, "JPEG", quality=JPEG_QUALITY, subsampling=FULL_COLOUR)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
