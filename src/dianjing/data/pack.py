"""Lengths -> packs: which records share one forward pass."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return packs of indices into `lengths`, each index once, no pack longer than pack_tokens.

    Best fit, longest first:

        lengths [3, 6, 4, 2], pack_tokens 8 -> [[1, 3], [0, 2]]

    Raises:
        ValueError: one item alone is longer than pack_tokens.
    """
    packs: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > pack_tokens:
            raise ValueError(f"item {index} has {length} tokens, more than a pack of {pack_tokens}")
        fitting = [i for i in range(len(packs)) if free[i] >= length]
        if fitting:
            best = min(fitting, key=lambda i: free[i])
            packs[best].append(index)
            free[best] -= length
        else:
            packs.append([index])
            free.append(pack_tokens - length)
    return [sorted(members) for members in packs]
