from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dianjing.eval.score import exact_match, normalise, score, summarise, summarise_by_type, token_f1, tokens


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


def test_summary_pairs_sight_over_the_same_questions() -> None:
    summary = summarise(
        [
            score("colour", "red", "red", other_picture="blue", no_picture="red"),
            score("colour", "blue", "red", other_picture="blue", no_picture="blue"),
            score("colour", "red", "red"),
        ]
    )
    assert summary.n == 3
    assert summary.accuracy == pytest.approx(2 / 3)
    assert summary.accuracy_other_picture == 0
    assert summary.accuracy_no_picture == 0.5
    assert summary.sight == 0.5  # 1 of the 2 questions that have another picture, minus 0


def test_summary_of_text_has_no_sight() -> None:
    summary = summarise([score("text only", "four", "four")])
    assert (summary.accuracy, summary.sight, summary.accuracy_other_picture) == (1, None, None)


def test_summaries_come_by_type_in_order() -> None:
    by_type = summarise_by_type([score("b", "x", "x"), score("a", "x", "y"), score("b", "x", "y")])
    assert {name: (one.n, one.accuracy) for name, one in by_type.items()} == {"b": (2, 0.5), "a": (1, 0.0)}
    assert list(by_type) == ["b", "a"]
