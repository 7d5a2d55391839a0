"""Answer and reference -> how good the answer is: METRICS, one line each."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ARTICLES = {"a", "an", "the"}
CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_TOKEN = re.compile(rf"[{CJK}]|[^\s{CJK}]+")


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


def contains_reference(answer: str, reference: str) -> bool:
    """Return whether the answer holds the reference's words next to each other: "It is red." holds "red"."""
    said, wanted = tokens(answer), tokens(reference)
    starts = range(len(said) - len(wanted) + 1) if wanted else ()
    return any(said[start : start + len(wanted)] == wanted for start in starts)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to measure an answer: a number from 0 to 1."""

    label: str
    measure: Callable[[str, str], float]
    """Of an answer and its reference."""
    answer_key: str = ""
    """Its JSON name at a single answer; "" = that of its mean."""


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(label="exact", measure=exact_match, answer_key="exact"),
    "f1": Metric(label="token F1", measure=token_f1),
    "contains": Metric(label="has reference", measure=contains_reference),
}
"""By the JSON name of the mean."""
