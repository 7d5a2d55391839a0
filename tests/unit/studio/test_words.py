"""Every word of the page is there in both languages, and none is there for nothing."""

from __future__ import annotations

import re
from importlib.resources import files

from dianjing.check.codes import CODES, SEVERITIES, translated
from dianjing.language import LANGUAGES
from dianjing.studio.session import FILTERS
from dianjing.studio.words import chosen_language, words
from tests.house.source import ROOT

FOLDER = ROOT / "src" / "dianjing" / "studio"
SPOKEN = {"undecided", "accepted", "rejected", *SEVERITIES, *(f"filter_{name}" for name in FILTERS)}
"""Words that are looked up by a name in the data."""
UNITS = {"seconds", "minutes", "hours", "days", "stale", "stale_draft", "no_more", "nothing_here"}
"""Words of which the page chooses one."""


def test_the_words_are_those_that_the_page_says() -> None:
    scripts = "".join(file.read_text("utf-8") for file in sorted((FOLDER / "static").glob("*.js")))
    page = (FOLDER / "page.html.j2").read_text("utf-8")
    said = {*re.findall(r'\bsay\("(\w+)"', scripts), *re.findall(r"\bt\.(\w+)", page)}
    assert set(words("en")) == said | SPOKEN | UNITS
    assert all(f'"{name}"' in scripts for name in UNITS)


def test_both_languages_fill_in_the_same_values() -> None:
    english, chinese = (words(language) for language in LANGUAGES)
    for name, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[name])), name
        assert re.search("[\u4e00-\u9fff]", chinese[name]) or name == "language"


def test_the_codes_mean_what_the_chinese_page_says() -> None:
    table = (files("dianjing.check") / "codes_zh.json").read_text("utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| \w+ \| \S* ?\| (.*) \| ?(.*) \|$", (ROOT / "docs/check_zh.md").read_text("utf-8"), re.MULTILINE
    )
    assert translated("zh") == {name: [meaning.strip(), remedy.strip()] for name, meaning, remedy in rows}
    assert list(translated("zh")) == list(CODES)
    assert translated("en") == {}
    assert table.endswith("}\n")


def test_the_first_language_that_there_is_wins() -> None:
    assert chosen_language("fr-CH, zh-TW;q=0.8, en;q=0.5") == "zh"
    assert chosen_language("en-GB,zh") == "en"
    assert chosen_language("*") == "en"
