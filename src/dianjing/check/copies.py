"""Pictures -> copies that every program reads alike: upright, opaque, 8 bits, sRGB, nothing but pixels added."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from dianjing.data.parallel import spread
from dianjing.errors import DataError
from dianjing.pictures.picture import (
    load_image,
    locate,
    open_picture,
    orientation,
    read_depth,
    transparent,
)
from dianjing.pictures.profile import profile_state
from dianjing.pictures.rule import PictureRule
from dianjing.progress import Watch

AT_ONCE = 32
PLAIN_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
PLAIN_MODES = ("1", "L", "P", "RGB")
CODE = "picture_copied"


def write_copies(
    root: str, names: Sequence[str], out: Path, rule: PictureRule, watch: Watch, workers: int = 0
) -> dict[str, tuple[str, str]]:
    """Copy pictures into the folder `out`, plain files as they are and all others as PNG.

    Returns the names that changed: name -> (CODE, name of the copy).

    Raises:
        DataError: the folder is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: it is not an empty folder; name another one (--pictures)")
    copies = _names_of_copies(names)
    changed: dict[str, tuple[str, str]] = {}
    tasks = [names[at : at + AT_ONCE] for at in range(0, len(names), AT_ONCE)]
    done = 0
    for group in spread(partial(_Copier, root, str(out), copies, rule), tasks, workers):
        changed |= {name: (CODE, copy) for name, copy in group if name != copy}
        done += len(group)
        watch("copies of pictures", done, len(names))
    return changed


def _names_of_copies(names: Iterable[str]) -> dict[str, str]:
    """Return what the copy of each picture is called if it is written as PNG: like no other picture."""
    taken = {os.path.normpath(name) for name in names}
    found: dict[str, str] = {}
    for name in names:
        copy = f"{os.path.normpath(name).replace('#', '.')}.png"
        while copy in taken:
            copy = copy.removesuffix(".png") + "_.png"
        taken.add(copy)
        found[name] = copy
    return found


class _Copier:
    """Copies pictures of one folder; made once in each process."""

    def __init__(self, root: str, out: str, copies: dict[str, str], rule: PictureRule) -> None:
        self._root, self._out, self._copies, self._rule = root, out, copies, rule

    def __call__(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, self._copied(name)) for name in names]

    def _copied(self, name: str) -> str:
        path, frame = locate(self._root, name)
        with open_picture(path, name, frame) as image:
            plain = not frame and _is_plain(image, name)
        copy = os.path.normpath(name) if plain else self._copies[name]
        target = os.path.join(self._out, copy)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if plain:
            shutil.copyfile(path, target)
        else:
            load_image(self._root, name, self._rule).save(target, "PNG")
        return copy


def _is_plain(image: Image.Image, name: str) -> bool:
    """Return whether any program reads an opened picture as training does."""
    return (
        image.format in PLAIN_FORMATS
        and image.mode in PLAIN_MODES
        and not transparent(image)
        and getattr(image, "n_frames", 1) == 1
        and profile_state(image) in ("", "srgb")
        and read_depth(image, name) is None
        and orientation(image) == 1
    )
