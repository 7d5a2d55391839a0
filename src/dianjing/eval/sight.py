"""Questions -> for each the pictures of another record: does the model look?

A score with the right picture says little: many questions can be guessed. Sight is that score minus the score with
another record's picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from dianjing.infer.questions import Question


def digests(names: Iterable[str], image_root: str) -> dict[str, str]:
    """Return the SHA-256 of each picture file, so that one picture under two names counts as one."""
    root = Path(image_root)
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sorted(set(names))}


def other_pictures(questions: Sequence[Question], digest_of: dict[str, str]) -> list[tuple[str, ...] | None]:
    """Return, for each question, as many other pictures; None if there are not enough.

    The pictures stand on a ring in the order of their digests, which does not depend on the order of the
    records; each is replaced by the next one on the ring that the question does not have. With one picture a
    question this is a derangement of the pictures: every picture is used as often as a wrong one as any other.

        ring a b c:  a -> b, b -> c, c -> a, (a, b) -> (c, c), (a, b, c) -> None
    """
    name_of = {digest_of[name]: name for question in questions for name in sorted(question.images)}
    ring = sorted(name_of)
    place = {digest: position for position, digest in enumerate(ring)}
    others: list[tuple[str, ...] | None] = []
    for question in questions:
        own = [digest_of[name] for name in question.images]
        if not own or set(own) == set(ring):
            others.append(None)
            continue
        chosen = []
        for digest in own:
            position = place[digest]
            while ring[position] in own:
                position = (position + 1) % len(ring)
            chosen.append(name_of[ring[position]])
        others.append(tuple(chosen))
    return others
