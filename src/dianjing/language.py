"""Texts for the user in their language: English stands in the source, `words_zh.json` has the Chinese."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from dianjing.errors import ConfigError

LANGUAGES = ("en", "zh")
CHOSEN = "DIANJING_LANG"
"""Environment variable with the language of this process and those it starts."""
FLAG = "--lang"
LOCALE = ("LC_ALL", "LC_MESSAGES", "LANG")
"""Variables that name the locale, the strongest first."""


def choose_language(arguments: Sequence[str]) -> list[str]:
    """Take --lang out of a command line, and keep the language it names, or else the locale's, for `say`.

    Raises:
        ConfigError: there is no such language.
    """
    rest, named = list(arguments), os.environ.get(CHOSEN, "")
    for number, word in enumerate(arguments):
        if word == FLAG or word.startswith(f"{FLAG}="):
            apart = word == FLAG
            named = " ".join(arguments[number + 1 : number + 2]) if apart else word.partition("=")[2]
            del rest[number : number + 1 + apart]
            break
    if named and named not in LANGUAGES:
        raise ConfigError(f"{FLAG} {named}: there are {', '.join(LANGUAGES)}")
    os.environ[CHOSEN] = named or _of_locale()
    return rest


def _of_locale() -> str:
    """Return the locale's language, if it can be written to the terminal."""
    locale = next((value for name in LOCALE if (value := os.environ.get(name))), "")
    try:
        "中文".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "en"
    return "zh" if locale.startswith("zh") else "en"


def language() -> str:
    """Return the language that is spoken."""
    return os.environ.get(CHOSEN) or "en"


def say(text: str, /, **values: object) -> str:
    """Return an English text in the user's language, with the values in the places of their names.

    A text that the table lacks, such as a name out of the data, stays as it is.
    """
    found = _chinese().get(text, text) if language() == "zh" else text
    return found.format(**values) if values else found


def counted(number: int, one: str, many: str) -> str:
    """Return `one` for 1 and `many` for any other number, which takes the place {number}."""
    return say(one if number == 1 else many, number=number)


@cache
def _chinese() -> dict[str, str]:
    return json.loads((files("dianjing") / "words_zh.json").read_text(encoding="utf-8"))
