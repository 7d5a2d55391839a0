from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.data.record import without_markers
from dianjing.eval.captions import caption_request, is_caption, other_questions
from dianjing.infer.questions import Question

DIGESTS = {name: f"digest of {name}" for name in "abcd"}


def asked(text: str, images: str = "a", type_: str = "t", reference: str = "x") -> Question:
    text = "<image>\n" * len(images) + text
    return Question(id="r", turn=0, type=type_, text=text, images=tuple(images), reference=reference)


def others(*questions: Question) -> list[str | None]:
    found = other_questions(questions, DIGESTS)
    assert all(one is None or one.images == own.images for one, own in zip(found, questions, strict=True))
    assert all(one is None or one.text.count("<image>") == len(one.images) for one in found)
    return [one and without_markers(one.text) for one in found]


@pytest.mark.parametrize(
    ("answer", "reference", "captions", "found"),
    [
        ("A red ball on a table.", "red", ["A red ball on the table."], True),
        ("Red ball, on a table", "red", ["a cat", "A red ball on the table."], True),
        ("red", "blue", ["A red ball."], False),
        ("A red ball.", "A red ball.", ["A red ball."], False),
        ("The ball is red.", "red", ["A red ball on the table."], False),
        ("桌上有一个红色的球。", "红色", ["桌上有一个红色的球"], True),
        ("", "red", [""], False),
        ("A red ball.", "red", [], False),
    ],
)
def test_an_answer_that_is_a_caption(answer: str, reference: str, captions: list[str], found: bool) -> None:
    assert is_caption(answer, reference, captions) is found


def test_a_caption_is_asked_for_in_the_language_of_the_question() -> None:
    assert caption_request(asked("What?", "ab")).text == "<image>\n<image>\nDescribe the picture."
    assert caption_request(asked("什么颜色?")).text == "<image>\n请描述这张图片。"


def test_another_question_about_the_same_picture_comes_first() -> None:
    questions = [asked("Colour?", reference="red"), asked("Shape?", reference="ball"), asked("Size?", "b")]
    assert others(*questions)[:2] == ["Shape?", "Colour?"]


def test_a_question_with_the_same_answer_is_not_another_question() -> None:
    questions = [
        asked("Is it red?", type_="yes_no", reference="Yes."),
        asked("Is it round?", type_="yes_no", reference="yes"),
        asked("How many?", "b", "count", "2"),
    ]
    assert others(*questions)[0] == "How many?"


def test_without_one_a_question_of_another_type_in_the_same_language() -> None:
    questions = [
        asked("Colour?", "a", "colour"),
        asked("What colour?", "b", "colour"),
        asked("Shape?", "c", "shape"),
        asked("形状?", "d", "shape"),
        asked("Fact?", "", "fact"),
    ]
    assert others(*questions) == ["Shape?", "Shape?", "Colour?", None, None]


@given(st.lists(st.tuples(st.sampled_from(["A?", "B?", "C?", "甲?"]), st.sampled_from("abcd")), max_size=8))
def test_the_order_of_the_records_does_not_matter(drawn: list[tuple[str, str]]) -> None:
    questions = [asked(text, image, type_=text + image, reference=text) for text, image in drawn]
    shuffled = random.Random(0).sample(questions, len(questions))
    found = dict(zip(((one.text, one.images) for one in questions), others(*questions), strict=True))
    assert found == dict(zip(((one.text, one.images) for one in shuffled), others(*shuffled), strict=True))
    assert all(other is None or other not in text for (text, _), other in found.items())
