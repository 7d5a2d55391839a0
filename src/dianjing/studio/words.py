"""The page's own words, in English and Chinese; errors are in English."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from dianjing.language import LANGUAGES


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    return json.loads((files("dianjing.studio") / "words.json").read_text(encoding="utf-8"))


def words(language: str) -> dict[str, str]:
    """Return every word of the page in one language."""
    return {name: texts[language] for name, texts in _table().items()}


def chosen_language(accepted: str) -> str:
    """Return the first language of an Accept-Language header that the page has, else English."""
    for part in accepted.split(","):
        language = part.split(";")[0].strip().lower()[:2]
        if language in LANGUAGES:
            return language
    return "en"
