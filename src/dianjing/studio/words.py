"""The page's own words with the meanings of the check's codes, in English and Chinese; errors are in English."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

LANGUAGES = ("en", "zh")


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    return json.loads((files("dianjing.studio") / "words.json").read_text(encoding="utf-8"))


def words(language: str) -> dict[str, str]:
    """Return every word of the page in one language."""
    return {name: texts[language] for name, texts in _table().items()}


@cache
def codes(language: str) -> dict[str, list[str]]:
    """Return meaning and remedy of each finding's code in a language that is not the check's own; {} for English."""
    if language == "en":
        return {}
    return json.loads((files("dianjing.studio") / f"codes_{language}.json").read_text(encoding="utf-8"))


def chosen_language(accepted: str) -> str:
    """Return the first language of an Accept-Language header that the page has, else English."""
    for part in accepted.split(","):
        language = part.split(";")[0].strip().lower()[:2]
        if language in LANGUAGES:
            return language
    return "en"
