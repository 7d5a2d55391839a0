from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.eval import evaluate as module
from dianjing.eval.evaluate import evaluate, times_asked
from dianjing.infer.questions import Question

COLOURS = {"red.png": "red", "blue.png": "blue", "green.png": "green"}


def question(type_: str, images: tuple[str, ...], reference: str) -> Question:
    text = "<image>\n" * len(images) + "Which colour?"
    return Question(id="r", turn=0, type=type_, text=text, images=images, reference=reference)


QUESTIONS = [
    *(question("colour", (name,), colour) for name, colour in COLOURS.items()),
    question("fact", (), "blue"),
]


@pytest.fixture
def root(tmp_path: Path) -> str:
    for name in COLOURS:
        (tmp_path / name).write_text(name)
    return str(tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Let a seeing oracle answer, and return what it was asked."""
    seen: list[Question] = []

    def answer_questions(loaded: Any, questions: Sequence[Question], root: str, tokens: int, advance: Any) -> list[str]:
        seen.extend(questions)
        advance(len(questions))
        assert all(one.text.count("<image>") == len(one.images) for one in questions)
        return [COLOURS[one.images[0]] if one.images and loaded.can_see else "blue" for one in questions]

    monkeypatch.setattr(module, "answer_questions", answer_questions)
    return seen


def test_an_eye_is_right_only_with_its_picture(root: str, asked: list[Question]) -> None:
    loaded: Any = SimpleNamespace(name="oracle", can_see=True)
    done: list[int] = []
    report = evaluate(loaded, QUESTIONS, root, 8, done.append)
    colour = report.by_type["colour"]
    assert (colour.accuracy, colour.accuracy_other_picture, colour.sight) == (1, 0, 1)
    assert colour.accuracy_no_picture == pytest.approx(1 / 3)
    assert report.by_type["fact"].sight is None
    assert (report.overall.n, report.overall.accuracy) == (4, 1)
    assert sum(done) == times_asked(loaded, QUESTIONS) == len(asked) == 4 + 3 + 3


def test_a_blind_model_is_asked_once_and_has_no_sight(root: str, asked: list[Question]) -> None:
    loaded: Any = SimpleNamespace(name="text", can_see=False)
    report = evaluate(loaded, QUESTIONS, root, 8)
    colour = report.by_type["colour"]
    assert colour.accuracy == colour.accuracy_no_picture == colour.accuracy_other_picture == pytest.approx(1 / 3)
    assert colour.sight == 0
    assert len(asked) == times_asked(loaded, QUESTIONS) == 4


@pytest.mark.usefixtures("asked")
def test_json_holds_every_answer(root: str) -> None:
    loaded: Any = SimpleNamespace(name="oracle", can_see=True)
    written = evaluate(loaded, QUESTIONS, root, 8).to_json()
    assert written["overall"]["accuracy"] == 1
    assert written["by_type"]["colour"]["sight"] == 1
    first, *_, last = written["answers"]
    assert (first["answer"], first["exact"], first["images"]) == ("red", True, ("red.png",))
    assert first["answer_other_picture"] in {"blue", "green"}
    assert last["answer_other_picture"] is None
