from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.eval.score import METRICS, contains_reference, exact_match, normalise, token_f1, tokens


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("It is red.", "it is red"),
        ("  The  ball IS\nred! ", "ball is red"),
        ("An answer, a good one", "answer good one"),
        ("3.5", "3.5"),
        ("There are 2.", "there are 2"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("-2 degrees", "-2 degrees"),
        ("red-blue", "red blue"),
        ("It's", "its"),
        ("A", "a"),
        ("ＲＥＤ", "red"),
        ("它是红色的。", "它是红色的"),
        ("", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_each_cjk_character_is_a_word() -> None:
    assert tokens("它是 RGB 红色。") == ["它", "是", "rgb", "红", "色"]


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is red", "It is red.", True),
        ("red", "It is red.", False),
        ("它是红色的", "它是红色的。", True),
        ("A", "B", False),
        ("the", "a", False),
        ("3.5", "35", False),
        ("-2", "2", False),
        ("", "Yes.", False),
    ],
)
def test_exact_match(answer: str, reference: str, right: bool) -> None:
    assert exact_match(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("It is red.", "it is red", 1.0),
        ("red", "It is red.", 2 * (1 / 1) * (1 / 3) / (1 / 1 + 1 / 3)),
        ("red red", "red blue", 0.5),
        ("No.", "Yes.", 0.0),
        ("", "Yes.", 0.0),
        ("左上角", "右上角", 2 / 3),
    ],
)
def test_token_f1(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


@given(st.text(), st.text())
def test_f1_is_a_share_that_is_one_for_equal_words(one: str, other: str) -> None:
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, other) == token_f1(other, one)
    if exact_match(one, other):
        assert token_f1(one, other) == 1


@pytest.mark.parametrize(
    ("answer", "reference", "held"),
    [
        ("It is red.", "Red", True),
        ("It is dark red.", "dark red", True),
        ("It is red and dark.", "dark red", False),
        ("There are 12.", "2", False),
        ("It is coloured.", "red", False),
        ("Nothing is left.", "no", False),
        ("A ball on the table", "ball on a table", True),
        ("它是红色的。", "红色", True),
        ("它是 red 色的。", "red", True),
        ("它是色红的。", "红色", False),
        ("red", "It is red.", False),
        ("", "red", False),
        ("red", "", False),
    ],
)
def test_an_answer_has_the_reference_in_whole_words(answer: str, reference: str, held: bool) -> None:
    assert contains_reference(answer, reference) is held


@given(st.text(), st.text(), st.text())
def test_what_is_put_around_a_reference_does_not_hide_it(before: str, reference: str, after: str) -> None:
    if tokens(reference) and reference == normalise(reference):
        assert contains_reference(f"{normalise(before)} {reference} {normalise(after)}", reference)


@given(st.text(), st.text())
def test_every_metric_is_between_0_and_1_and_1_for_the_reference_itself(answer: str, reference: str) -> None:
    for metric in METRICS.values():
        assert 0 <= metric.measure(answer, reference) <= 1
        assert not tokens(reference) or metric.measure(reference, reference) == 1
