"""The English of source and documents: a list of foreign turns of phrase that must not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, ROOT

PATTERNS = {
    r"(?<!there )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|better\b|worse\b)": "say is not a, are not",
    r"\bbeside\b": "say next to, with, in addition to",
    r"\btold\b(?! (?:in words|apart))": "say printed, given, chosen by",
    r"\banew\b": "say again",
    r"\bput(?:s|ting)? right\b": "say fix, correct",
    r"\bso many\b": "say that many, this number of",
    r"\bof like (?:length|size|shape)": "say of similar length",
    r'"""(?:What|Whether)\b': "begin with a noun, or with Return",
}
HISTORY = {"log.md", "CHANGELOG.md", "performance.md"}
"""Diaries: they are not rewritten."""
SOURCES = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2"), *PACKAGE.rglob("*.toml")]
DOCUMENTS = [path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if path.name not in HISTORY]


def foreign(text: str) -> Iterator[str]:
    """Yield each place with the phrase to use instead."""
    flat = " ".join(text.split())
    for pattern, instead in PATTERNS.items():
        flags = re.IGNORECASE if pattern[0] != '"' else re.NOFLAG
        for found in re.finditer(pattern, flat, flags):
            yield f"...{flat[max(0, found.start() - 30) : found.end() + 20]}...: {instead}"


def found_in(paths: list[Path]) -> list[str]:
    return [f"{path.name}: {place}" for path in paths for place in foreign(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("folder", sorted({path.relative_to(PACKAGE).parts[0] for path in SOURCES}))
def test_source_is_in_plain_english(folder: str) -> None:
    places = found_in([path for path in SOURCES if path.relative_to(PACKAGE).parts[0] == folder])
    assert not places


def test_documents_are_in_plain_english() -> None:
    places = found_in(DOCUMENTS)
    assert not places


@pytest.mark.parametrize(
    "text",
    [
        "it is no dict",
        "weights\n    are no numbers",
        "kept beside it",
        "is told of",
        "Begin anew",
        "puts right",
        "so many rows",
        "of like length",
        '"""What is read."""',
        '"""Whether it fits."""',
    ],
)
def test_each_pattern_sees_its_phrase(text: str) -> None:
    assert len(list(foreign(text))) == 1


@pytest.mark.parametrize(
    "text", ["there is no such file", "it is no longer there", "no GPU is there", '"""Return what."""']
)
def test_good_phrases_pass(text: str) -> None:
    assert not list(foreign(text))
