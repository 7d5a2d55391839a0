"""Pictures of noise, no two alike."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image


def write_pictures(folder: Path, number: int, size: tuple[int, int] = (40, 30)) -> list[str]:
    """Write pictures, some in a folder inside, and return their names in order."""
    (folder / "sub").mkdir(parents=True)
    names = [f"{'sub/' if i % 3 == 0 else ''}{i:03d}.png" for i in range(number)]
    for i, name in enumerate(names):
        rng = random.Random(i)
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(folder / name)
    return sorted(names)
