"""What a shell completes: the verbs, the flags that their help lists, and the shipped recipes."""

from __future__ import annotations

import re
import subprocess

import pytest

from dianjing.cli.completion import words
from dianjing.cli.main import VERBS, main
from dianjing.config.load import shipped_recipes


@pytest.fixture
def bash(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", "bash"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_it_knows_the_flags_that_help_lists(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([verb], [verb, "new"]) if verb == "recipes" else ([verb],):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    listed = {*re.findall(r"^[│|]? +(?:-h, )?(--[a-z][\w.-]+)", capsys.readouterr().out, re.MULTILINE)}
    known = {word for word in words()[verb] if word.startswith("--")}
    assert known - {"--engine"} == listed


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["comp"], {"compare", "completion"}),
        (["help", "tr"], {"train"}),
        (["train", "tinyworld"], {"tinyworld_finetune", "tinyworld_full", "tinyworld_pretrain"}),
        (["plan", "--data.pack"], {"--data.pack-tokens"}),
        (["completion", ""], {"bash", "zsh", "fish", "--help"}),
        (["recipes", "copy", "course"], {"course_photo"}),
    ],
)
def test_bash_completes(bash: str, typed: list[str], offered: set[str]) -> None:
    line = " ".join(f"'{word}'" for word in ("dianjing", *typed))
    script = f'{bash}\nCOMP_WORDS=({line}); COMP_CWORD={len(typed)}; _dianjing; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_the_same_words(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for name in (*VERBS, *shipped_recipes(), "help"):
        assert name in out
    flag = "-l data.pack-tokens" if shell == "fish" else "--data.pack-tokens"
    assert out.count(flag) == 2  # of train and plan


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "tcsh"])
    assert "('bash', 'zsh', 'fish')" in " ".join(capsys.readouterr().err.split())
