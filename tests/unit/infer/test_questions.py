from __future__ import annotations

from dianjing.data.record import Record, Turn, with_markers, without_markers
from dianjing.infer.questions import questions_of


def record(*turns: tuple[str, str], images: tuple[str, ...] = (), types: tuple[str, ...] = ()) -> Record:
    asked = tuple(Turn(question=question, answer=answer) for question, answer in turns)
    return Record(id="r", images=images, turns=asked, types=types, source="data.json", index=0)


def test_each_turn_is_asked_alone_with_the_picture() -> None:
    first, second = questions_of(
        record(("<image>\nWhat?", "A."), ("And?", "B."), images=("a.png",), types=("what", "and"))
    )
    assert (first.text, first.images, first.type, first.reference) == ("<image>\nWhat?", ("a.png",), "what", "A.")
    assert (second.text, second.images, second.type) == ("<image>\nAnd?", ("a.png",), "and")
    assert (second.id, second.turn) == ("r", 1)


def test_a_turn_with_its_own_picture_is_asked_with_that() -> None:
    turns = (("<image>\nWhat?", "A."), ("Now <image> or <image>?", "B."), ("Which?", "C."))
    found = questions_of(record(*turns, images=("a.png", "b.png", "c.png")))
    assert [question.images for question in found] == [
        ("a.png",),
        ("b.png", "c.png"),
        ("a.png", "b.png", "c.png"),
    ]
    assert found[1].text == "Now <image> or <image>?"
    assert found[2].text == "<image>\n<image>\n<image>\nWhich?"


def test_a_later_picture_is_not_shown_early() -> None:
    first, _ = questions_of(record(("Hello.", "A."), ("<image>\nWhat?", "B."), images=("a.png",)))
    assert (first.text, first.images, first.type) == ("Hello.", (), "text only")


def test_markers_in_and_out() -> None:
    assert with_markers("What?", 2) == "<image>\n<image>\nWhat?"
    assert with_markers("", 1) == "<image>"
    assert with_markers(" What? ", 0) == " What? "
    assert without_markers("<image>\nWhat?") == "What?"
    assert without_markers("Is <image> it?") == "Is  it?"
