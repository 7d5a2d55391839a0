"""Hashes of records and pictures -> those that are the same or look the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, UInt8, UInt64

BITS_APART = 2
"""Most bits of the dHash in which pictures of one motif, saved again or scaled, differ..."""
LEVELS_APART = 8
"""...and most of 255 levels by which any pixel of their thumbnails differs."""
BAND_BITS = 21
"""Of hashes that differ in two bits one of three bands is the same."""
NEIGHBOURS = 64
"""Neighbours, in the order of hashes, with which a picture is compared in each band."""


def repeated(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (later, first) for each hash that was there before; 0 stands for nothing."""
    values = np.asarray(hashes, dtype=np.uint64)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(values) else np.zeros(0, bool)
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(values)), 0))]
    later = ~begins & (ordered != 0)
    yield from sorted(zip(order[later].tolist(), first[later].tolist(), strict=True))


def look_alike(
    gradients: UInt64[np.ndarray, " pictures"], thumbs: UInt8[np.ndarray, "pictures bytes"]
) -> dict[int, int]:
    """Return later -> earlier picture that looks the same."""
    found: dict[int, int] = {}
    for band in range(3):
        key = (gradients >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)
        order = np.lexsort((gradients, key))
        for apart in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-apart], order[apart:]
            same_band = key[one] == key[other]
            if not same_band.any():
                break
            one, other = one[same_band], other[same_band]
            close = np.bitwise_count(gradients[one] ^ gradients[other]) <= BITS_APART
            for i, j in _alike(one[close], other[close], thumbs):
                earlier, later = sorted((i, j))
                found[later] = min(earlier, found.get(later, earlier))
    return found


def _alike(
    one: Int[np.ndarray, " pairs"], other: Int[np.ndarray, " pairs"], thumbs: UInt8[np.ndarray, "pictures bytes"]
) -> Iterator[tuple[int, int]]:
    for at in range(0, len(one), 10_000):
        left, right = one[at : at + 10_000], other[at : at + 10_000]
        levels = np.abs(thumbs[left].astype(np.int16) - thumbs[right].astype(np.int16)).max(axis=1)
        alike = levels <= LEVELS_APART
        yield from zip(left[alike].tolist(), right[alike].tolist(), strict=True)
