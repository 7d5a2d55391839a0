"""Scenes in words: the many ways a scene is described to a text-only model, and small talk.

The base language model learns from these alone; no picture, picture token or picture feature is involved.
"""

from __future__ import annotations

import random

from dianjing.tinyworld.grammar import (
    LANGUAGES,
    WORDS,
    Language,
    Question,
    ask_several,
    caption,
    caption_question,
    words_for,
)
from dianjing.tinyworld.scene import PLACES, Scene

FORMS = ("sentence", "sentences", "places", "fields", "cells", "plain")

SMALL_TALK = {
    "en": (
        ("Hello!", "Hello! How can I help you?"),
        ("Hi, how are you?", "I am fine, thank you."),
        ("What is your name?", "I am a small language model."),
        ("Who are you?", "I am a small language model who talks about simple scenes."),
        ("Thank you.", "You are welcome."),
        ("Goodbye.", "Goodbye! Have a nice day."),
        ("What can you do?", "I can answer questions about a scene that you describe to me."),
        ("Can you see pictures?", "No, I only read text."),
        ("What is two plus two?", "Two plus two is four."),
        ("What is one plus two?", "One plus two is three."),
        ("Name three colours.", "Red, green and blue."),
        ("Name three shapes.", "Circle, square and triangle."),
        ("How many corners does a triangle have?", "A triangle has three corners."),
        ("How many corners does a square have?", "A square has four corners."),
        ("What colour is the sky?", "On a clear day the sky is blue."),
        ("What colour is grass?", "Grass is green."),
        ("Good morning.", "Good morning! What would you like to talk about?"),
        ("Tell me something.", "A ring is a circle with a hole in the middle."),
    ),
    "zh": (
        ("你好！", "你好！有什么可以帮你的吗？"),
        ("你是谁？", "我是一个小小的语言模型。"),
        ("你叫什么名字？", "我是一个小小的语言模型。"),
        ("谢谢。", "不客气。"),
        ("再见。", "再见！祝你愉快。"),
        ("你会做什么？", "我可以回答关于你描述的场景的问题。"),
        ("你能看图片吗？", "不能，我只能读文字。"),
        ("二加二等于几？", "二加二等于四。"),
        ("说出三种颜色。", "红色、绿色和蓝色。"),
        ("说出三种形状。", "圆形、正方形和三角形。"),
        ("三角形有几个角？", "三角形有三个角。"),
        ("天空是什么颜色的？", "晴天的天空是蓝色的。"),
        ("草是什么颜色的？", "草是绿色的。"),
        ("早上好。", "早上好！你想聊什么？"),
    ),
}


def _sentences(rng: random.Random, scene: Scene, words: Language, chinese: bool) -> str:
    order = rng.sample(scene, len(scene))
    pattern = (
        "{place}有一个{size}的{colour}{shape}。" if chinese else "There is a {size} {colour} {shape} in the {place}."
    )
    return ("" if chinese else " ").join(pattern.format(**words_for(words, thing)) for thing in order)


def _fields(rng: random.Random, scene: Scene, words: Language) -> str:
    """One line an object, its four words in an order drawn once for the scene."""
    keys = rng.sample(("size", "colour", "shape", "place"), 4)
    order = rng.sample(scene, len(scene))
    return "\n".join(", ".join(words_for(words, thing)[key] for key in keys) for thing in order)


def _cells(scene: Scene, words: Language) -> str:
    """Say all nine cells from the top left to the bottom right, the empty ones too."""
    by_place = {thing.place: thing for thing in scene}
    cells = []
    for place in range(PLACES):
        thing = by_place.get(place)
        content = "{size} {colour} {shape}".format(**words_for(words, thing)) if thing else words.empty
        cells.append(f"{words.places[place]} {content}")
    return ", ".join(cells)


def describe(rng: random.Random, scene: Scene, language: str, form: str) -> str:
    """Say a scene in words.

    Args:
        form: one of FORMS; "sentence" is the canonical caption, "plain" is words without punctuation.
    """
    words = WORDS[language]
    if form == "sentence":
        return caption(scene, language)
    if form == "sentences":
        return _sentences(rng, scene, words, language == "zh")
    if form == "fields":
        return _fields(rng, scene, words)
    if form == "cells":
        return _cells(scene, words)
    order = rng.sample(scene, len(scene))
    joint, pattern = (
        (" ", "{size} {colour} {shape} {place}") if form == "plain" else ("; ", "{place}: {size} {colour} {shape}")
    )
    return joint.join(pattern.format(**words_for(words, thing)) for thing in order)


def gather(rng: random.Random, scene: Scene) -> list[str]:
    """Say a scene as phrases, each to be read at one position: all cells in order, or the objects in any."""
    language = rng.choice(LANGUAGES)
    words, space = WORDS[language], "" if language == "zh" else " "
    pattern = space + space.join(("{size}", "{colour}", "{shape}", "{place}"))
    if rng.random() < 0.5:
        return [pattern.format(**words_for(words, thing)) for thing in rng.sample(scene, len(scene))]
    by_place = {thing.place: thing for thing in scene}
    return [
        pattern.format(**words_for(words, by_place[place]))
        if place in by_place
        else space + space.join((words.empty, words.places[place]))
        for place in range(PLACES)
    ]


def told_dialogue(rng: random.Random, scene: Scene, number: int, description: str | None = None) -> list[Question]:
    """A dialogue that opens with the scene in words; description and questions may be in different languages."""
    spoken, written = rng.choice(LANGUAGES), rng.choice(LANGUAGES)
    questions = ask_several(rng, scene, spoken, number)
    if rng.random() < 0.4:
        questions.insert(rng.randint(0, len(questions)), caption_question(rng, scene, spoken))
    first = questions[0]
    description = description or describe(rng, scene, written, rng.choice(FORMS))
    return [Question(first.type, f"{description}\n{first.text}", first.answer), *questions[1:]]


def blind_dialogue(rng: random.Random, scene: Scene) -> list[Question]:
    """A question on a scene nobody described: the honest answer is that there is nothing to see."""
    language = rng.choice(LANGUAGES)
    question = rng.choice([*ask_several(rng, scene, language, 3), caption_question(rng, scene, language)])
    return [Question(question.type, question.text, WORDS[language].blind)]


def small_talk(rng: random.Random) -> list[Question]:
    """One to three turns of chat."""
    language = rng.choice(LANGUAGES)
    return [Question("chat", *turn) for turn in rng.sample(SMALL_TALK[language], rng.randint(1, 3))]


def text_dialogue(rng: random.Random, scene: Scene) -> list[Question]:
    """Draw one training dialogue of the base model: mostly scenes in words, some chat, some blind questions."""
    kind = rng.random()
    if kind < 0.03:
        return small_talk(rng)
    if kind < 0.06:
        return blind_dialogue(rng, scene)
    return told_dialogue(rng, scene, rng.randint(3, 8))
