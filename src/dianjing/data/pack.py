"""Lengths -> packs: which records share one forward pass."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return packs of indices into `lengths`, each index once, no pack longer than pack_tokens.

    As few packs as best fit, longest first, finds. Where records of similar length can share them, they do, and the
    packs are made as even as that allows: attention is faster so, and memory is what the longest pack takes.

        lengths [3, 6, 4, 2], pack_tokens 8 -> [[1, 3], [0, 2]]          (like lengths would take three packs)
        lengths [3, 5, 3, 5, 2, 3], pack_tokens 12 -> [[1, 3], [0, 2, 4, 5]]

    Raises:
        ValueError: one item alone is longer than pack_tokens.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fitting = _best_fit(lengths, order, pack_tokens)
    alike = _cut([lengths[i] for i in order], len(fitting), pack_tokens)
    packs = fitting if alike is None else [order[begin:end] for begin, end in alike]
    return [sorted(members) for members in packs]


def _best_fit(lengths: Sequence[int], order: Sequence[int], pack_tokens: int) -> list[list[int]]:
    packs: list[list[int]] = []
    free: list[int] = []
    for index in order:
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
    return packs


def _cut(lengths: Sequence[int], parts: int, most: int) -> list[tuple[int, int]] | None:
    """Return where to cut a row of lengths into at most `parts` parts, the longest as short as it can be.

    None if one of them would be longer than `most`.
    """
    if len(_filled(lengths, most)) > parts:
        return None
    low, high = 0, most  # too short, long enough
    while high - low > 1:
        middle = (low + high) // 2
        if max(lengths, default=0) <= middle and len(_filled(lengths, middle)) <= parts:
            high = middle
        else:
            low = middle
    return _filled(lengths, high)


def _filled(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return the parts of a row of lengths, each filled before the next begins."""
    parts: list[tuple[int, int]] = []
    begin = total = 0
    for place, length in enumerate(lengths):
        if place > begin and total + length > most:
            parts.append((begin, place))
            begin, total = place, 0
        total += length
    return [*parts, (begin, len(lengths))] if lengths else []
