"""The course page: both languages have the same commands, and all of them parse."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dianjing.cli.flags import RunArguments, parse, parse_with_recipe

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```sh.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXTS = [BLOCK.findall((DOCS / name).read_text(encoding="utf-8")) for name in ("course.md", "course_zh.md")]
COMMANDS = [line for block in TEXTS[0] for line in block.splitlines() if line.startswith("dianjing ")]


def test_both_languages_have_the_same_commands() -> None:
    assert TEXTS[0] == TEXTS[1]
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    module: Any = importlib.import_module(f"dianjing.cli.{verb}")
    if issubclass(module.Arguments, RunArguments):
        # mine.toml is a copy of course_photo, which the page makes before.
        words = ["course_photo" if word == "mine.toml" else word for word in arguments]
        assert parse_with_recipe(module.Arguments, words, verb, "").recipe
    else:
        assert parse(module.Arguments, arguments, verb, "")
