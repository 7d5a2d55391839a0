"""Questions have one right answer each, worked out here a second time from the scene."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from dianjing.tinyworld.grammar import (
    LANGUAGES,
    QUESTION_TYPES,
    WORDS,
    ask,
    ask_several,
    caption,
    caption_f1,
    read_caption,
)
from dianjing.tinyworld.scene import COLOURS, SHAPES, Thing, allowed_pairs, sample_scene
from dianjing.tinyworld.wording import FORMS, describe

SCENE = (
    Thing(0, "small", "red", "circle"),
    Thing(4, "large", "blue", "circle"),
    Thing(5, "small", "red", "ring"),
)


def answers_to(type_: str, language: str = "en") -> dict[str, str]:
    found = [ask(random.Random(seed), SCENE, language, type_) for seed in range(400)]
    return {question.text: question.answer for question in found if question}


@pytest.mark.parametrize(
    ("type_", "text", "answer"),
    [
        ("colour", "What colour is the ring?", "It is red."),
        ("shape", "What shape is the blue object?", "It is a circle."),
        ("size", "How big is the blue circle?", "It is large."),
        ("where", "Where is the blue circle?", "It is in the centre."),
        ("what_at", "What is in the middle right?", "A small red ring."),
        ("what_at", "What is in the bottom left?", "Nothing."),
        ("count", "How many objects are there?", "There are three."),
        ("count_of", "How many circles are there?", "There are two."),
        ("count_of", "How many stars are there?", "There are none."),
        ("exist", "Is there a red ring?", "Yes."),
        ("exist", "Is there a blue ring?", "No."),
        ("relation", "Is the red circle above the blue circle?", "Yes."),
        ("relation", "Is the blue circle to the right of the red ring?", "No."),
    ],
)
def test_answers_are_true(type_: str, text: str, answer: str) -> None:
    assert answers_to(type_)[text] == answer


def test_what_cannot_be_asked_is_not_asked() -> None:
    assert "What colour is the circle?" not in answers_to("colour")  # there are two
    assert not any("red object" in text for text in answers_to("shape"))
    assert not any("ring above the blue circle" in text for text in answers_to("relation"))  # same row


def test_both_languages_say_the_same() -> None:
    for type_ in QUESTION_TYPES:
        for seed in range(50):
            english, chinese = (ask(random.Random(seed), SCENE, language, type_) for language in LANGUAGES)
            assert (english is None) == (chinese is None)
            if english and chinese and type_ in ("exist", "relation"):
                assert (english.answer == "Yes.") == (chinese.answer in ("有。", "是的。"))


def test_no_answer_can_be_guessed_often() -> None:
    """The most common answer of each type: what a model without eyes could score at best."""
    rng, pairs = random.Random(0), allowed_pairs("train")
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(3000):
        for question in ask_several(rng, sample_scene(rng, pairs), "en", 5):
            answers[question.type][question.answer] += 1
    guess = {type_: max(found.values()) / found.total() for type_, found in answers.items()}
    assert set(guess) == set(QUESTION_TYPES)
    assert sum(guess.values()) / len(guess) < 0.36
    assert guess["exist"] == pytest.approx(0.5, abs=0.05)
    assert guess["relation"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_caption_can_be_read_back(language: str) -> None:
    rng, pairs = random.Random(1), allowed_pairs("any")
    for _ in range(300):
        scene = sample_scene(rng, pairs)
        assert read_caption(caption(scene, language)) == frozenset(scene)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_wrong_word_in_a_caption_costs_its_object(language: str) -> None:
    words = WORDS[language]
    said = caption(SCENE, language)
    wrong = said.replace(words.colours[COLOURS.index("blue")], words.colours[COLOURS.index("green")])
    assert caption_f1(said, SCENE) == 1
    assert caption_f1(wrong, SCENE) == pytest.approx(2 / 3)
    assert caption_f1(words.blind, SCENE) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_description_names_every_object(form: str, language: str) -> None:
    text, words = describe(random.Random(2), SCENE, language, form), WORDS[language]
    for thing in SCENE:
        assert words.colours[COLOURS.index(thing.colour)] in text
        assert words.shapes[SHAPES.index(thing.shape)] in text
        assert words.places[thing.place] in text
