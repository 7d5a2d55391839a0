"""Picture files, each opened and decoded as training does it -> their faults, with hashes of their looks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dianjing.check.picture_notes import file_notes
from dianjing.pictures.picture import (
    PictureError,
    check_image,
    locate,
    naming_breaks,
    open_picture,
    read_samples,
    to_rgb,
)
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.pictures.wide import Depth
from dianjing.pictures.wide import brightest as brightest_of

TINY = 16
"""Pixels of the shorter side."""
NARROW = 10
"""Longer to shorter side."""
FLAT = 3
"""Levels of 255 within which two neighbours count as the same, so that noise in an even area changes nothing."""
THUMB = 8
"""Side in pixels of the picture that is compared."""


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
    brightest: int = 0
    """Its largest value, if it has more than 8 bits and its file does not name the white; else 0."""
    size: tuple[int, int] = (0, 0)
    content: int = 0
    """Hash of the file."""
    gradient: int = 0
    """64-bit dHash: whether each of 8 x 8 grey pixels is brighter than its left neighbour."""
    thumb: bytes = b""
    """THUMB x THUMB pixels, RGB; empty for a picture of one colour."""


class PictureChecker:
    """Checks pictures of one folder."""

    def __init__(self, root: str, rule: PictureRule = PLAIN) -> None:
        self._root, self._rule = root, rule

    def __call__(self, names: Sequence[str]) -> list[Picture]:
        """Return what each picture is like."""
        return [self._check(name) for name in names]

    def _check(self, name: str) -> Picture:
        brightest = 0
        try:
            path, frame = locate(self._root, name)
            with open_picture(path, name, frame) as image, naming_breaks(name):
                samples = read_samples(image, name)
                notes = [*file_notes(image, name, self._rule)]
                if samples:
                    brightest = brightest_of(samples)
                    notes.append(_depth_note(samples.depth, self._rule))
                upright = to_rgb(image, samples, name, self._rule)
        except PictureError as error:
            return Picture(code=error.code, text=str(error), passes=self._passes(name), brightest=brightest)
        if brightest > self._rule.white > 0:
            notes.append(("picture_clipped", f"values up to {brightest}, and data.white is {self._rule.white}"))
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))
        if frame:
            content.update(f"#{frame}".encode())
        small = upright.resize((36, 32), Image.Resampling.BOX)
        grey = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
        blank = len(upright.getcolors(1) or ()) == 1
        if blank:
            notes.append(("picture_blank", "one colour and nothing else"))
        return Picture(
            passes=True,
            notes=(*notes, *_size_notes(*upright.size)),
            brightest=brightest,
            size=upright.size,
            content=int.from_bytes(content.digest(), "little"),
            gradient=int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1] + FLAT).tobytes(), "big"),
            thumb=b"" if blank else small.resize((THUMB, THUMB), Image.Resampling.BOX).tobytes(),
        )

    def _passes(self, name: str) -> bool:
        try:
            check_image(self._root, name, self._rule)
        except PictureError:
            return False
        return True


def _depth_note(depth: Depth, rule: PictureRule) -> tuple[str, str]:
    if depth.white:
        white = depth.named_by
    else:
        white = f"data.white {rule.white}" if rule.white else f"{depth.range}, the largest there is"
    return "picture_16bit", f"more than 8 bits; white is {white}"


def _size_notes(width: int, height: int) -> Iterator[tuple[str, str]]:
    shorter, longer = sorted((width, height))
    if shorter < TINY:
        yield "picture_tiny", f"{width}x{height} pixels"
    if longer > NARROW * shorter:
        yield "picture_narrow", f"{width}x{height} pixels"
