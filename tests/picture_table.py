"""The tables of docs/pictures.md, from files made for them: python -m tests.picture_table."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dianjing.pictures.picture import PictureError, load_image
from dianjing.pictures.rule import PictureRule
from tests.odd_dicoms import ODD

STARTS = {
    "empty.jpg": b"",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "page.jpg": b"<!DOCTYPE html><html>not found</html>",
    "photo.jxl": b"\xff\x0a" + bytes(60),
    "clip.mp4": b"\0\0\0\x18ftypmp42" + bytes(60),
    "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "report.pdf": b"%PDF-1.7",
    "layers.psd": b"8BPS\0\1",
    "array.npy": b"\x93NUMPY\1\0",
    "._photo.jpg": b"\0\5\x16\7" + bytes(60),
}


def read() -> Iterator[str]:
    """Yield a row for each kind of picture that is read: how far it is from its true pixels at most."""
    off: dict[str, int] = {}
    names: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for odd in ODD.values():
            odd.write(Path(folder, odd.name))
            image = np.asarray(load_image(folder, odd.name, PictureRule(white=odd.white))).astype(int)
            kind = odd.kind.partition(", orientation")[0] + (", lying" if "orientation" in odd.kind else "")
            off[kind] = max(off.get(kind, 0), int(np.abs(image - odd.truth()).max()))
            names[kind] = f"`data.white = {odd.white}`" if odd.white else ""
    for kind, difference in off.items():
        yield f"| {kind} | {names[kind]} | {difference} |"


def refused() -> Iterator[str]:
    """Yield a row for each kind of file that is refused: the sentence."""
    with tempfile.TemporaryDirectory() as folder:
        for name, start in STARTS.items():
            Path(folder, name).write_bytes(start)
            try:
                load_image(folder, name)
            except PictureError as error:
                yield f"| `{name}` | {str(error).partition(': ')[2]} |"


if __name__ == "__main__":
    print(*read(), "", *refused(), sep="\n")
