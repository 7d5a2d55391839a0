from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.errors import DataError
from dianjing.infer import chat as module
from dianjing.infer.chat import Session, chat, open_picture
from dianjing.infer.generate import Conversation
from dianjing.pictures.rule import PLAIN
from tests.loaded_models import picture

LOADED: Any = SimpleNamespace(picture_rule=PLAIN, name="tiny", can_see=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Conversation]:
    """Answer every question with its number, and return what was asked."""
    seen: list[Conversation] = []

    def stream(loaded: Any, conversation: Conversation, tokens: int, sampling: Any) -> Iterator[str]:
        seen.append(Conversation(list(conversation.history), conversation.question, list(conversation.images)))
        if conversation.question == "too long":
            raise DataError("it is too long; /reset")
        yield "answer "
        if conversation.question == "stop me":
            raise KeyboardInterrupt
        yield str(len(seen))

    monkeypatch.setattr(module, "stream", stream)
    return seen


def talk(session: Session, *lines: str) -> str:
    """Return what is written while the lines are typed."""
    left = list(lines)

    def read() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    written: list[str] = []
    chat(session, read, written.append)
    return "".join(written)


def test_the_given_pictures_come_with_the_first_question(asked: list[Conversation]) -> None:
    one, two = picture(9, 9), picture(8, 8)
    shown = talk(Session(loaded=LOADED, first_images=[one, two]), "What?", "", "And?")
    assert asked[0] == ([], "<image>\n<image>\nWhat?", [one, two])
    assert asked[1] == ([("<image>\n<image>\nWhat?", "answer 1")], "And?", [one, two])
    assert "answer 2" in shown


def test_more_pictures_and_a_new_conversation(asked: list[Conversation], tmp_path: Path) -> None:
    first = picture(9, 9)
    picture(12, 6).save(tmp_path / "second one.png")
    session = Session(loaded=LOADED, first_images=[first])
    talk(session, "What?", f"/image {tmp_path}/second one.png", "And this?", "/reset", "Again?", "/exit", "no more")
    assert [conversation.question for conversation in asked] == [
        "<image>\nWhat?",
        "<image>\nAnd this?",
        "<image>\nAgain?",
    ]
    assert [image.size for image in asked[1].images] == [(9, 9), (12, 6)]
    assert (asked[2].history, asked[2].images) == ([], [first])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image /nowhere/x.png", "no such file"),
        ("/image http://127.0.0.1:1/x.png", "addresses are not opened"),
        ("/picture x", "/image PATH"),
        ("too long", "it is too long"),
        ("stop me", "forgotten"),
    ],
)
def test_a_bad_line_does_not_end_the_conversation(asked: list[Conversation], line: str, said: str) -> None:
    session = Session(loaded=LOADED, first_images=[picture(9, 9)])
    session.waiting = []
    shown = talk(session, line, "What?")
    assert said in shown
    assert asked[-1] == ([], "What?", [])


@pytest.mark.usefixtures("asked")
def test_a_text_model_says_that_it_cannot_see() -> None:
    loaded: Any = SimpleNamespace(picture_rule=PLAIN, name="text", can_see=False)
    assert "cannot see" in talk(Session(loaded=loaded))
    assert "cannot see" not in talk(Session(loaded=LOADED))


def test_a_picture_is_found_through_a_link_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    picture(9, 7).save(tmp_path / "real" / "x.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real" / "x.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_picture(str(tmp_path / "link.png"), PLAIN).size == (9, 7)
    assert open_picture("~/link.png", PLAIN).size == (9, 7)
