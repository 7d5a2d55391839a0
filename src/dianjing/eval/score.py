"""Answer and reference -> right or wrong, token F1, and a summary by question type."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ARTICLES = {"a", "an", "the"}
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def normalise(text: str) -> str:
    """Return the text as it is compared: case, punctuation and English articles do not count.

    A point between digits, and a minus sign before a number, are part of the number ("3.5", "-2"); a comma
    between digits is not ("1,000" = "1000"). An answer that is nothing but articles stays as it is, so that "A"
    and "B" remain two options.

        normalise("The  ball is RED.")  == "ball is red"
        normalise("它是红色的。")        == "它是红色的"
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|['’]", "", text)
    kept = [character if _is_kept(text, position) else " " for position, character in enumerate(text)]
    words = "".join(kept).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def _is_kept(text: str, position: int) -> bool:
    character = text[position]
    if not unicodedata.category(character).startswith("P"):
        return True
    before, after = text[position - 1 : position] or " ", text[position + 1 : position + 2]
    if character == ".":
        return before.isdigit() and after.isdigit()
    return character == "-" and before.isspace() and after.isdigit()


def tokens(text: str) -> list[str]:
    """Return the normalised words; each Chinese, Japanese or Korean character is a word of its own."""
    return _TOKEN.findall(normalise(text))


def exact_match(answer: str, reference: str) -> bool:
    """Return whether the answer says the reference, word for word."""
    return tokens(answer) == tokens(reference)


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of word precision and recall, words counted as often as they occur (SQuAD)."""
    given, wanted = Counter(tokens(answer)), Counter(tokens(reference))
    if not given or not wanted:
        return float(given == wanted)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One answered question: what it counts for, and how good the answers were.

    `other_picture` and `no_picture` are None for a question that has no picture, or whose set has no other one.
    """

    type: str
    exact: bool
    f1: float
    other_picture: bool | None = None
    no_picture: bool | None = None


def score(
    type_: str,
    answer: str,
    reference: str,
    *,
    other_picture: str | None = None,
    no_picture: str | None = None,
) -> Scored:
    """Return what the answers to one question are worth; the last two were given with another picture, and none."""
    return Scored(
        type=type_,
        exact=exact_match(answer, reference),
        f1=token_f1(answer, reference),
        other_picture=None if other_picture is None else exact_match(other_picture, reference),
        no_picture=None if no_picture is None else exact_match(no_picture, reference),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Means over the questions of one type, each between 0 and 1; None where no question has the value."""

    n: int
    accuracy: float
    f1: float
    accuracy_other_picture: float | None
    accuracy_no_picture: float | None
    sight: float | None
    """Accuracy with the right picture minus accuracy with another one, over the questions that have both."""


def summarise(scored: Sequence[Scored]) -> Summary:
    """Return the means over at least one question."""
    paired = [one for one in scored if one.other_picture is not None]
    other = _mean(one.other_picture for one in paired)
    right = _mean(one.exact for one in paired)
    return Summary(
        n=len(scored),
        accuracy=_mean(one.exact for one in scored) or 0.0,
        f1=_mean(one.f1 for one in scored) or 0.0,
        accuracy_other_picture=other,
        accuracy_no_picture=_mean(one.no_picture for one in scored if one.no_picture is not None),
        sight=None if right is None or other is None else right - other,
    )


def summarise_by_type(scored: Sequence[Scored]) -> dict[str, Summary]:
    """Return one summary a question type, in order of first appearance."""
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(one.type, []).append(one)
    return {name: summarise(group) for name, group in groups.items()}


def _mean(values: Iterable[float | bool | None]) -> float | None:
    numbers = [float(value) for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
