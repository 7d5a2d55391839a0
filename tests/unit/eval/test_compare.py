from __future__ import annotations

import base64
import io
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from PIL import Image, ImageChops

from dianjing.eval.compare import THUMBNAIL_PIXELS, Column, page, thumbnail, verdict
from dianjing.eval.evaluate import Answered, Report
from dianjing.eval.summary import summarise, summarise_by_type
from dianjing.infer.questions import Question
from tests.loaded_models import picture

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The tags of a page, and the text of each by class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def classes(self, name: str) -> int:
        return sum(name in (attributes.get("class") or "").split() for _, attributes in self.tags)


def asked(number: int, images: tuple[str, ...], reference: str) -> Question:
    text = "<image>\n" * len(images) + f"Question {number}?"
    return Question(id=f"r{number}", turn=0, type="what", text=text, images=images, reference=reference)


QUESTIONS = [
    asked(0, ("a.png",), "It is red."),
    asked(1, ("a.png",), "Yes."),
    asked(2, (), "Four things lie on a table beside the window of the old house."),
]
PICTURES = {"a.png": picture(60, 20)}


def column(name: str, *answers: str, can_see: bool = True) -> Column:
    return replace(Column.of_answers(name, QUESTIONS, answers), can_see=can_see)


COLUMNS = [
    column("blind", "No.", "Yes.", "", can_see=False),
    column("seeing", "It is red.", HOSTILE, "Four things lie on a table beside the door of an old house."),
]


def test_the_page_is_self_contained() -> None:
    for _, attributes in Page(page("Title", QUESTIONS, COLUMNS, PICTURES)).tags:
        assert not str(attributes.get("href", "")) or attributes["href"].startswith("#")
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert "url(" not in str(attributes.get("style", ""))


def test_what_a_model_says_is_text() -> None:
    shown = Page(page("<b>Title</b>", QUESTIONS, COLUMNS, PICTURES))
    assert HOSTILE in shown.text
    assert "<b>Title</b>" in shown.text
    assert [tag for tag, _ in shown.tags].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in shown.tags)


def test_every_answer_is_there_with_its_verdict() -> None:
    shown = Page(page("Title", QUESTIONS, COLUMNS, PICTURES))
    assert (shown.classes("row"), shown.classes("answer")) == (3, 6)
    assert (shown.classes("right"), shown.classes("close"), shown.classes("wrong")) == (2, 1, 3)
    assert "(no answer)" in shown.text
    assert "33.3" in shown.text
    assert shown.text.count("Cannot see") == 1
    rows = [found for tag, found in shown.tags if tag == "article" and "data-unlike" in found]
    assert [row["data-disagree"] for row in rows] == ["1", "1", "1"]


def evaluated(*right: str) -> Report:
    """Return a report of QUESTIONS, of which those with a picture got another answer with another one."""
    answered = tuple(
        Answered(
            question=replace(question, type=type_),
            answer=answer,
            answer_other_picture="It is blue." if question.images else None,
            answer_no_picture="It is red." if question.images else None,
        )
        for question, answer, type_ in zip(QUESTIONS, right, ("colour", "yes_no", "count"), strict=True)
    )
    scored = [one.scored for one in answered]
    by_type = summarise_by_type(scored)
    return Report(model="run", can_see=True, overall=summarise(scored), by_type=by_type, answers=answered)


def test_the_page_shows_the_figures_of_eval() -> None:
    report = evaluated("It is red.", "Yes.", "no")
    shown = Page(page("Title", QUESTIONS, [Column.of_report(report)], PICTURES)).text
    for label, figures in report.overall.table():
        if any(figures):
            assert label in shown
        for figure in filter(None, figures):
            assert f"{figure.mean:.3f} {figure.low:.2f}–{figure.high:.2f}" in shown
    assert all(name in shown for name in ("right picture", "other picture", "no picture", "sight"))


def test_the_page_shows_accuracy_by_type() -> None:
    report = evaluated("It is red.", "No.", "no")
    questions = [one.question for one in report.answers]
    html = page("Title", questions, [Column.of_report(report, "a"), Column.of_report(report, "b")], PICTURES)
    assert "colour (1)" in Page(html).text
    assert html.count("<td>1.000 <small>1.00–1.00</small></td>") >= 2
    assert "right, by type" not in page("Title", QUESTIONS, COLUMNS, PICTURES)


def test_a_column_may_hold_the_first_answers_only() -> None:
    column = Column.of_report(evaluated("It is red.", "No.", "no"), first=1)
    assert (column.name, column.answers, column.summary.n) == ("run", ["It is red."], 1)


def test_a_short_answer_with_one_wrong_word_is_wrong() -> None:
    assert verdict("It is green.", "It is red.")["verdict"] == "wrong"


def test_another_wording_of_a_long_reference_is_not_called_wrong() -> None:
    reference = "Four things lie on a table beside the window of the old house."
    assert verdict("A red cup, a plate and two spoons have been left in a room.", reference)["verdict"] == "other"
    assert verdict("", reference)["verdict"] == "wrong"
    assert verdict("It is red.", "red")["verdict"] == "close"
    assert verdict("Nothing else of that kind is anywhere to be seen on it.", "red")["verdict"] == "wrong"


def test_sentences_are_headed_by_f1_and_the_sight_of_losses() -> None:
    """Exact match is 0 for every model, so the page does not head them with it."""
    answered = tuple(
        Answered(
            question=QUESTIONS[0],
            answer="A red thing",
            answer_other_picture="A thing",
            answer_no_picture="A thing",
            loss=1.0 + number,
            loss_other_picture=1.5 + number,
            loss_no_picture=2.0,
        )
        for number in range(3)
    )
    scored = [one.scored for one in answered]
    report = Report(model="m", can_see=True, overall=summarise(scored), by_type={}, answers=answered)
    shown = Page(page("Title", [QUESTIONS[0]] * 3, [Column.of_report(report)], PICTURES)).text
    assert "% right" not in shown
    assert "token F1" in shown
    assert "Sight +0.500 +0.50 to +0.50 nats a token" in shown


def test_questions_about_one_picture_share_it() -> None:
    shown = Page(page("Title", QUESTIONS, COLUMNS, PICTURES))
    assert shown.classes("card") == 2
    assert [tag for tag, _ in shown.tags].count("img") == 1


def decoded(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1])))


def test_a_small_picture_stays_exact_and_a_large_one_becomes_small() -> None:
    small, large = picture(60, 20), picture(900, 300)
    assert ImageChops.difference(decoded(thumbnail(small)).convert("RGB"), small).getbbox() is None
    assert decoded(thumbnail(large)).size == (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS // 3)
    assert large.size == (900, 300)
