"""An answer to a question with options -> the letter that it chooses, by the rules that lmms-eval 0.7 scores with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

OPEN_FORMS = (
    ("", ""),
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
"""Marks that may stand around a letter that is a word of its own; the first form with exactly one letter wins."""
PHRASES = (
    *(f"{the}{which}answer is" for which in ("", "correct ", "best ") for the in ("the ", "")),
    *(f"{the}{which}option is" for which in ("correct ", "best ") for the in ("the ", "")),
    *(f"{the}{which}choice is" for which in ("", "correct ") for the in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""After one of these the next letter is meant."""
QUANTIFIER_WORDS = 3
"""With more words than this, an A may be the article."""


def mmbench_letter(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter by MMBench's rules without a judge: a letter alone, an option's text, a likely letter."""
    return _single_letter(answer) or _option_named(answer, options) or likeliest_letter(answer, sorted(options))


def _single_letter(answer: str) -> str:
    words = answer.split()
    for before, after in OPEN_FORMS:
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        article = not before + after and "A" in words and len(words) > QUANTIFIER_WORDS
        if len(found) == 1 and not article:
            return found[0]
    return ""


def _option_named(answer: str, options: Mapping[str, str]) -> str:
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


def likeliest_letter(answer: str, letters: Sequence[str]) -> str:
    """Return the letter in the most certain place of an answer, the last of equally certain ones; "" without one."""
    bare = answer.strip()
    for mark in ",.!?;:'\"":
        bare = bare.strip(mark)
    text, inner = f" {bare} ", bare.strip()
    if not inner:
        return ""
    found: list[tuple[int, int, str]] = []
    for certainty, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        found += [(certainty, at, one) for one in letters if (at := text.rfind(form.format(one))) >= 0]
    for phrase in PHRASES:
        if (start := text.lower().find(phrase)) >= 0:
            found += [(7, at, one) for one in letters if (at := text.find(one, start + len(phrase))) >= 0]
    found += [(10, 0, one) for one in letters if inner.startswith(one) and not inner[1:2].isalpha()]
    found += [(9, len(text) - 1, one) for one in letters if inner.endswith(one) and not inner[-2:-1].isalpha()]
    found = found or [(0, at, one) for one in letters if (at := text.rfind(one)) >= 0]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else ""


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter of MMMU's rules: "(A)", else "A ", else "A.", else an option's text in a long answer.

    The last of several counts. Where MMMU's own program draws a letter at random, "" is returned.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in options if form.format(letter) in text]:
            return _last(found, [text.rfind(place.format(letter)) for letter in found])
    if len(text.split()) > 5 and (found := [one for one, said in options.items() if said.lower() in text.lower()]):
        return _last(found, [text.lower().rfind(options[letter].lower()) for letter in found])
    return ""


def _last(letters: Sequence[str], places: Sequence[int]) -> str:
    return letters[places.index(max(places))]
