"""What is dropped, and what only looks like it."""

from __future__ import annotations

import pytest

from dianjing.make.filters import REASONS, is_in, same_answer, why_dropped

DROPPED = [
    ("refusal", "I'm sorry, but I can't help with that.", "en"),
    ("refusal", "I cannot see any image.", "en"),
    ("refusal", "As an AI language model, I do not see.", "en"),
    ("refusal", "Unfortunately, I was given no picture.", "en"),
    ("refusal", "抱歉，我看不到图片。", "zh"),
    ("refusal", "我无法查看图片。", "zh"),
    ("refusal", "作为一个人工智能助手，我没有眼睛。", "zh"),
    ("leak", "The caption says that it is a cat.", "en"),
    ("leak", "According to the description, it is a cat.", "en"),
    ("leak", "A cat.<|im_end|>", "en"),
    ("leak", "<image> A cat.", "en"),
    ("leak", "A cat.</s>", "en"),
    ("leak", "ASSISTANT: A cat.", "en"),
    ("leak", "根据描述，这是一只猫。", "zh"),
    ("leak", "标题中提到了一只猫。", "zh"),
    ("preamble", "Sure! A cat lies there.", "en"),
    ("preamble", "Here is a caption: a cat.", "en"),
    ("preamble", "当然，这是一只猫。", "zh"),
    ("empty", "...", "en"),
    ("too_long", "cat " * 2000, "en"),
    ("echo", "what is it", "en"),
    ("language", "这是一只睡在沙发上的黑色的猫。", "en"),
    ("language", "This is a black cat that sleeps on a sofa.", "zh"),
]
KEPT = [
    ("It cannot be seen from here whether the shop is open.", "en"),
    ("She holds a sign that says sorry.", "en"),
    ("The red ball, I can tell, is in front.", "en"),
    ("A sign with a caption hangs on the wall; the label says 出口.", "en"),
    ("A robot with the letters AI on its chest.", "en"),
    ("Of course the cat sleeps, it is night.", "en"),
    ("Here is where the road ends.", "en"),
    ("7", "zh"),
    ("BMW", "zh"),
    ("一辆无法行驶的汽车。", "zh"),
    ("图中的人拿着 iPhone 15 Pro Max 手机，正在拍照。", "zh"),
    ("店名下面的标题是红色的。", "zh"),
]


@pytest.mark.parametrize(("reason", "answer", "language"), DROPPED, ids=lambda value: value[:20])
def test_dropped_with_its_reason(reason: str, answer: str, language: str) -> None:
    assert why_dropped("What is it?", answer, language) == reason  # type: ignore[arg-type]
    assert reason in REASONS


@pytest.mark.parametrize(("answer", "language"), KEPT, ids=lambda value: value[:20])
def test_kept(answer: str, language: str) -> None:
    assert why_dropped("What is it?", answer, language) == ""  # type: ignore[arg-type]


def test_the_question_is_looked_at_too() -> None:
    assert why_dropped("What does the sign say?", "A cat.", "en") == ""
    assert why_dropped("The caption mentions a cat, where is it?", "There.", "en") == "leak"
    assert why_dropped("?", "A cat.", "en") == "empty"
    assert why_dropped("What is it? " * 100, "A cat.", "en") == "too_long"


def test_no_language_is_any_language() -> None:
    assert why_dropped("What is it?", "这是一只睡在沙发上的黑色的猫。", None) == ""
    assert is_in("", "zh")


@pytest.mark.parametrize(
    ("answer", "blind", "same"),
    [
        ("The grass is green.", "the grass is green", True),
        ("The grass is very green.", "The grass is green.", True),
        ("It is red.", "It is blue.", False),
        ("草是绿色的。", "草是绿色的", True),
    ],
)
def test_same_answer(answer: str, blind: str, same: bool) -> None:
    assert same_answer(answer, blind) == same
