"""The table of Chinese texts against the source, and which language is chosen."""

from __future__ import annotations

import ast
import json
import re
import string
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

import dianjing
from dianjing.cli.main import main
from dianjing.language import CHOSEN, LOCALE, choose_language, language, say

PACKAGE = Path(dianjing.__file__).parent
TABLE: dict[str, str] = json.loads((PACKAGE / "words_zh.json").read_text(encoding="utf-8"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEMPLATES = sorted(PACKAGE.rglob("*.html.j2"))
IN_TEMPLATE = re.compile(r"""\bsay\("([^"]+)\"""")


def places(text: str) -> list[str]:
    """Return the names and formats of a text's places, in alphabetical order."""
    return sorted(f"{name}:{form}" for _, name, form, _ in string.Formatter().parse(text) if name is not None)


def said(tree: ast.AST) -> Iterator[str]:
    """Yield the texts that a file hands to `say` and `counted` as they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("say", "counted"):
            texts = node.args[:1] if node.func.id == "say" else node.args[1:]
            yield from (text.value for text in texts if isinstance(text, ast.Constant))


TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
SAID = {text for tree in TREES for text in said(tree)} | {
    text for path in TEMPLATES for text in IN_TEMPLATE.findall(path.read_text(encoding="utf-8"))
}
WRITTEN = SAID | {
    node.value
    for tree in TREES
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
}


@pytest.fixture(autouse=True)
def neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LOCALE, CHOSEN):
        monkeypatch.setenv(name, "")


def test_every_text_that_is_said_is_in_the_table() -> None:
    assert len(SAID) > 50
    assert not sorted(SAID - TABLE.keys())


def test_the_table_has_nothing_else() -> None:
    assert not [text for text in TABLE if text not in WRITTEN]


@pytest.mark.parametrize("text", TABLE)
def test_a_translation_has_the_same_values(text: str) -> None:
    assert places(TABLE[text]) == places(text)
    assert TABLE[text] != text
    assert not re.search(r"[\u4e00-\u9fff] ?[,;:?!](?: |$)", TABLE[text]), "Chinese text has Chinese punctuation"


@pytest.mark.parametrize(
    ("variables", "words", "chosen"),
    [
        ({}, [], "en"),
        ({"LANG": "zh_CN.UTF-8"}, [], "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, [], "en"),
        ({"LANG": "zh_CN.UTF-8"}, ["--lang", "en"], "en"),
        ({CHOSEN: "zh"}, [], "zh"),
        ({CHOSEN: "zh"}, ["--lang=en"], "en"),
        ({}, ["--lang", "zh"], "zh"),
    ],
)
def test_which_language(
    variables: dict[str, str], words: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="utf-8"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_language(["check", *words, "data.json"]) == ["check", "data.json"]
    assert language() == chosen
    assert say("Findings") == ("检查结果" if chosen == "zh" else "Findings")


def test_an_output_that_cannot_hold_chinese_gets_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="cp1252"))
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    choose_language([])
    assert language() == "en"


def test_a_language_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lang", "fr", "check"]) == 2
    assert "--lang fr: there are en, zh" in capsys.readouterr().err
