from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dianjing.errors import DataError
from dianjing.eval import evaluate as module
from dianjing.eval.evaluate import evaluate, times_asked
from dianjing.infer.questions import Question

COLOURS = {"red.png": "red", "blue.png": "blue", "green.png": "green"}


def question(type_: str, images: tuple[str, ...], reference: str, text: str = "Which colour?") -> Question:
    text = "<image>\n" * len(images) + text
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

    def answer_questions(
        loaded: Any, questions: Sequence[Question], image_root: str, answered: Any, max_new_tokens: int, files: Any
    ) -> list[str]:
        seen.extend(questions)
        assert all(one.text.count("<image>") == len(one.images) for one in questions)
        answers = [loaded.says(one) if loaded.can_see else "blue" for one in questions]
        for one, answer in zip(questions, answers, strict=True):
            answered(one, answer)
        return answers

    def reference_losses(
        loaded: Any, questions: Sequence[Question], image_root: str, advance: Any, files: Any
    ) -> list[float]:
        advance(len(questions))
        return [float(not loaded.can_see or loaded.says(one) != one.reference) for one in questions]

    monkeypatch.setattr(module, "answer_questions", answer_questions)
    monkeypatch.setattr(module, "reference_losses", reference_losses)
    return seen


def looks(question: Question) -> str:
    return COLOURS[question.images[0]] if question.images else "blue"


def captions(question: Question) -> str:
    return f"A {looks(question)} ball on a table."


def seeing(says: Callable[[Question], str] = looks) -> Any:
    return SimpleNamespace(name="oracle", can_see=True, says=says)


def test_an_eye_is_right_only_with_its_picture(root: str, asked: list[Question]) -> None:
    done: list[int] = []
    report = evaluate(seeing(), QUESTIONS, root, 8, done.append)
    colour = report.by_type["colour"]
    assert [colour.mean(name) for name in ("accuracy", "accuracy_other_picture", "sight")] == [1, 0, 1]
    assert colour.mean("accuracy_no_picture") == pytest.approx(1 / 3)
    assert report.by_type["fact"].mean("sight") is None
    assert (report.overall.n, report.overall.mean("accuracy")) == (4, 1)
    # With another picture it is the question of another record, and without it is one question: both asked once.
    assert len(asked) == 4 + 3
    assert sum(done) == 4 + 3 + 3 + 3 + 4 + 3 + 3
    assert sum(done) <= times_asked(seeing(), QUESTIONS) == 4 + 4 * 3 + 4 + 2 * 3
    assert [colour.mean(name) for name in ("loss", "loss_other_picture", "loss_sight")] == [0, 1, 1]


def test_losses_are_not_measured_where_they_are_not_wanted(
    root: str, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "reference_losses", lambda *_, **__: pytest.fail("a loss was measured"))
    for model in (seeing(), SimpleNamespace(name="blind", can_see=False)):
        report = evaluate(model, QUESTIONS, root, 8, with_losses=False)
        assert report.overall.mean("accuracy") is not None
        assert [report.overall.mean(name) for name in ("loss", "loss_other_picture", "loss_sight")] == [None] * 3
    assert asked


ABOUT_ONE = [
    question("colour", ("red.png",), "red"),
    question("shape", ("red.png",), "ball", "Which shape?"),
    question("place", ("red.png",), "on a table", "Where is it?"),
]


def test_a_model_that_captions_whatever_is_asked(root: str, asked: list[Question]) -> None:
    report = evaluate(seeing(captions), ABOUT_ONE, root, 8)
    assert [report.overall.mean(name) for name in ("captions", "same_answer", "accuracy")] == [1, 1, 0]
    assert report.overall.mean("contains") == pytest.approx(1)
    assert [one.text for one in asked][-1] == "<image>\nDescribe the picture."
    assert len({(one.text, one.images) for one in asked}) == len(asked)


@pytest.mark.usefixtures("asked")
def test_a_model_that_answers(root: str) -> None:
    said = {"Which colour?": "red", "Which shape?": "ball", "Where is it?": "on a table"}
    answers = seeing(lambda one: said.get(one.text.removeprefix("<image>\n"), captions(one)))
    report = evaluate(answers, ABOUT_ONE, root, 8)
    assert [report.overall.mean(name) for name in ("captions", "same_answer", "accuracy")] == [0, 0, 1]
    first = report.to_json()["answers"][0]
    assert first["other_question"] in {"Which shape?", "Where is it?"}
    assert first["captions"] == ("A red ball on a table.",)


@pytest.mark.usefixtures("asked")
def test_captions_in_the_data_count_and_are_not_counted(root: str) -> None:
    """A caption on request is what is wanted; the reference of such a question is a caption to compare others with."""
    asked_for = question("caption", ("red.png",), "One red ball lies on the table.", "What is there?")
    says = {"Describe the picture.": "I see something."}
    told = seeing(lambda one: says.get(one.text.removeprefix("<image>\n"), "There lies one red ball on the table."))
    report = evaluate(told, [ABOUT_ONE[0], asked_for], root, 8)
    assert report.by_type["colour"].mean("captions") == 1
    assert report.by_type["caption"].mean("captions") is None


def test_a_blind_model_is_asked_once_and_has_no_sight(root: str, asked: list[Question]) -> None:
    loaded: Any = SimpleNamespace(name="text", can_see=False)
    done: list[int] = []
    report = evaluate(loaded, QUESTIONS, root, 8, done.append)
    colour = report.by_type["colour"]
    names = ("accuracy", "accuracy_no_picture", "accuracy_other_picture")
    assert [colour.mean(name) for name in names] == [pytest.approx(1 / 3)] * 3
    assert colour.mean("sight") == 0
    assert report.by_type["fact"].mean("accuracy_no_picture") is None
    assert (report.overall.mean("captions"), report.overall.mean("same_answer")) == (None, None)
    assert len(asked) == 4
    assert sum(done) == times_asked(loaded, QUESTIONS) == 4 + 4
    assert [colour.mean(name) for name in ("loss", "loss_other_picture", "loss_sight")] == [1, 1, 0]


@pytest.mark.usefixtures("asked")
def test_json_holds_every_answer(root: str) -> None:
    written = evaluate(seeing(), QUESTIONS, root, 8).to_json()
    assert written["overall"]["accuracy"] == 1
    assert written["by_type"]["colour"]["sight"] == 1
    first, *_, last = written["answers"]
    assert (first["answer"], first["exact"], first["images"]) == ("red", True, ("red.png",))
    assert (first["f1"], first["contains"]) == (1, True)
    assert first["answer_other_picture"] in {"blue", "green"}
    assert last["answer_other_picture"] is None


def test_one_picture_is_compared_with_a_foreign_one(root: str, asked: list[Question], tmp_path: Path) -> None:
    """A model that says the same of any picture is right with a cat too: without it the table would show a dash."""
    cat = tmp_path / "elsewhere" / "cat.png"
    cat.parent.mkdir()
    cat.write_text("cat")
    recites = seeing(lambda one: {"Which colour?": "red", "Which shape?": "ball"}.get(one.text.split("\n")[-1], "?"))
    alone = evaluate(recites, ABOUT_ONE[:2], root, 8)
    assert (alone.overall.mean("sight"), alone.shown_foreign) == (None, 0)
    with_cat = evaluate(recites, ABOUT_ONE[:2], root, 8, foreign=cat)
    assert (with_cat.overall.mean("accuracy"), with_cat.overall.mean("sight"), with_cat.shown_foreign) == (1, 0, 2)
    assert ("cat.png",) in {one.images for one in asked}
    with_others = evaluate(seeing(), QUESTIONS, root, 8, foreign=cat)
    assert (with_others.shown_foreign, with_others.by_type["colour"].mean("sight")) == (0, 1)


@pytest.mark.usefixtures("asked")
def test_a_foreign_picture_that_is_in_the_set_is_refused(root: str) -> None:
    with pytest.raises(DataError, match="in the data too"):
        evaluate(seeing(), ABOUT_ONE, root, 8, foreign=Path(root) / "red.png")
