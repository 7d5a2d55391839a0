"""Prompt files: the shipped ones are whole, and a wrong one says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from dianjing.errors import ConfigError
from dianjing.make.filters import why_dropped
from dianjing.make.prompts import choose_prompts, read_prompt, read_questions, shipped_prompts, summary

GOOD = "# My own.\n# kind: colours\n# language: en\n# reply: pairs\n\nWrite {pairs} questions about colours.\n"


@pytest.mark.parametrize("path", shipped_prompts().values(), ids=lambda path: path.stem)
def test_shipped_prompts_are_whole(path: Path) -> None:
    prompt = read_prompt(path, 7)
    assert prompt.name == f"{prompt.kind}_{prompt.language}"
    assert summary(path)
    assert ("7" in prompt.texts[0]) == (prompt.reply == "pairs")
    assert "{pairs}" not in prompt.texts[0]
    assert not any(why_dropped(question, "A cat.", None) for question in prompt.questions)


def test_every_kind_is_there_in_both_languages() -> None:
    names = {path.stem.rsplit("_", 1)[0] for path in shipped_prompts().values()}
    assert len(shipped_prompts()) == 2 * len(names)
    assert names == {"caption", "conversation", "description", "reasoning", "shallow_to_deep"}


def test_names_files_and_languages(tmp_path: Path) -> None:
    own = tmp_path / "colours.txt"
    own.write_text(GOOD, encoding="utf-8")
    chosen = choose_prompts(["caption", "reasoning_zh", str(own)], "both", 5)
    assert [one.name for one in chosen] == ["caption_en", "caption_zh", "reasoning_zh", "colours"]
    assert chosen[-1].kind == "colours"
    assert [one.name for one in choose_prompts(["caption"], "zh", 5)] == ["caption_zh"]


def test_an_edit_changes_the_hash(tmp_path: Path) -> None:
    own = tmp_path / "colours.txt"
    own.write_text(GOOD, encoding="utf-8")
    before = read_prompt(own, 5)
    own.write_text(GOOD + "Be brief.\n", encoding="utf-8")
    assert read_prompt(own, 5).sha256 != before.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.replace("language: en", "language: fr"), '"# language: fr"'),
        (GOOD.replace("# kind: colours\n", ""), '"# kind: "'),
        (GOOD.replace("reply: pairs", "reply: text"), "write the questions"),
        (GOOD + "\n== questions ==\nWhat?\n", "remove == questions =="),
        (GOOD.replace("# reply", "# answer"), "line 4"),
        (GOOD.split("Write")[0], "no prompt under the header"),
        ("", '"# kind: "'),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(content: str | bytes, message: str, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_prompt(own, 5)
    assert message in str(error.value)
    assert "own.txt" in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["captoin_en"], "did you mean 'caption_en'"),
        (["caption", "caption_en"], "two prompts are called caption_en"),
        (["none.txt"], "none.txt: cannot be read"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_prompts(names, "en", 5)
    assert message in str(error.value)


def test_questions_are_asked_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "asked.txt"
    file.write_text("What is it?\n\n  它是什么颜色？\n", encoding="utf-8")
    prompt = read_questions(file)
    assert (prompt.name, prompt.reply, prompt.texts) == ("asked", "text", ("What is it?", "它是什么颜色？"))
    for content, message in (("\n", "no question"), ("Why?\nWhy?\n", "twice")):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_questions(file)
