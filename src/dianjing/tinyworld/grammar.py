"""Sentences about a scene, in English and Chinese: questions, answers, captions, descriptions.

Answers are exact: each question has one right sentence, so a score is a comparison of strings.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from dianjing.tinyworld.scene import COLOURS, PLACES, SHAPES, Scene, Thing

LANGUAGES = ("en", "zh")
QUESTION_TYPES = ("colour", "shape", "size", "where", "what_at", "count", "count_of", "exist", "relation")
CAPTION = "caption"


@dataclass(frozen=True)
class Language:
    """The words of one language, in the order of scene.py's constants, and how sentences are made."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    plurals: tuple[str, ...]
    sizes: tuple[str, ...]
    places: tuple[str, ...]
    numbers: tuple[str, ...]
    empty: str
    questions: dict[str, tuple[str, ...]]
    answers: dict[str, str]
    yes: str
    no: str
    yes_relation: str
    no_relation: str
    directions: tuple[str, ...]
    captions: tuple[str, ...]
    blind: str


ENGLISH = Language(
    colours=COLOURS,
    shapes=SHAPES,
    plurals=("circles", "squares", "triangles", "diamonds", "stars", "crosses", "rings"),
    sizes=("small", "large"),
    places=(
        "top left",
        "top middle",
        "top right",
        "middle left",
        "centre",
        "middle right",
        "bottom left",
        "bottom middle",
        "bottom right",
    ),
    numbers=("There are none.", "There is one.", "There are two.", "There are three.", "There are four."),
    empty="empty",
    questions={
        "colour": ("What colour is the {shape}?", "Which colour does the {shape} have?"),
        "shape": ("What shape is the {colour} object?", "Which shape does the {colour} object have?"),
        "size": ("Is the {colour} {shape} small or large?", "How big is the {colour} {shape}?"),
        "where": ("Where is the {colour} {shape}?", "In which place is the {colour} {shape}?"),
        "what_at": ("What is in the {place}?", "What do you find in the {place}?"),
        "count": ("How many objects are there?", "How many objects are there in all?"),
        "count_colour": ("How many {colour} objects are there?",),
        "count_shape": ("How many {plural} are there?",),
        "exist": ("Is there a {colour} {shape}?", "Is a {colour} {shape} there?"),
        "relation": ("Is the {colour} {shape} {direction} the {colour2} {shape2}?",),
    },
    answers={
        "colour": "It is {colour}.",
        "shape": "It is a {shape}.",
        "size": "It is {size}.",
        "where": "It is in the {place}.",
        "what_at": "A {size} {colour} {shape}.",
        "nothing": "Nothing.",
    },
    yes="Yes.",
    no="No.",
    yes_relation="Yes.",
    no_relation="No.",
    directions=("to the left of", "to the right of", "above", "below"),
    captions=(
        "Describe the picture.",
        "Describe this image.",
        "What does the picture show?",
        "Give a short description of the image.",
    ),
    blind="I cannot see a picture.",
)

CHINESE = Language(
    colours=("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "黑色", "白色"),
    shapes=("圆形", "正方形", "三角形", "菱形", "星形", "十字形", "圆环"),
    plurals=("圆形", "正方形", "三角形", "菱形", "星形", "十字形", "圆环"),
    sizes=("小", "大"),
    places=("左上角", "上方中间", "右上角", "左侧中间", "正中间", "右侧中间", "左下角", "下方中间", "右下角"),
    numbers=("一个也没有。", "有一个。", "有两个。", "有三个。", "有四个。"),
    empty="空",
    questions={
        "colour": ("{shape}是什么颜色的？", "图中的{shape}是什么颜色？"),
        "shape": ("{colour}的物体是什么形状？", "图中{colour}的物体是什么形状的？"),
        "size": ("{colour}的{shape}是大的还是小的？", "{colour}的{shape}有多大？"),
        "where": ("{colour}的{shape}在哪里？", "{colour}的{shape}在什么位置？"),
        "what_at": ("{place}有什么？", "{place}是什么？"),
        "count": ("一共有几个物体？", "图中有多少个物体？"),
        "count_colour": ("有几个{colour}的物体？",),
        "count_shape": ("有几个{plural}？",),
        "exist": ("有{colour}的{shape}吗？", "图中有没有{colour}的{shape}？"),
        "relation": ("{colour}的{shape}在{colour2}的{shape2}的{direction}吗？",),
    },
    answers={
        "colour": "它是{colour}的。",
        "shape": "它是{shape}。",
        "size": "它是{size}的。",
        "where": "它在{place}。",
        "what_at": "一个{size}的{colour}{shape}。",
        "nothing": "什么也没有。",
    },
    yes="有。",
    no="没有。",
    yes_relation="是的。",
    no_relation="不是。",
    directions=("左边", "右边", "上面", "下面"),
    captions=("描述一下这张图片。", "请描述这张照片。", "图片里有什么？", "请简短地描述图片。"),
    blind="我看不到图片。",
)

WORDS = {"en": ENGLISH, "zh": CHINESE}


@dataclass(frozen=True, slots=True)
class Question:
    """One question on one scene, with its only right answer."""

    type: str
    text: str
    answer: str


def words_for(language: Language, thing: Thing) -> dict[str, str]:
    """Return an object's size, colour, shape and place in a language."""
    return {
        "size": language.sizes[("small", "large").index(thing.size)],
        "colour": language.colours[COLOURS.index(thing.colour)],
        "shape": language.shapes[SHAPES.index(thing.shape)],
        "place": language.places[thing.place],
    }


def _ask(rng: random.Random, language: Language, type_: str, answer: str, *, form: str = "", **slots: str) -> Question:
    return Question(type_, rng.choice(language.questions[form or type_]).format(**slots), answer)


def _unique(scene: Scene, attribute: str) -> list[Thing]:
    values = [getattr(thing, attribute) for thing in scene]
    return [thing for thing, value in zip(scene, values, strict=True) if values.count(value) == 1]


def _attribute(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question | None:
    pool = (
        _unique(scene, {"colour": "shape", "shape": "colour"}[type_]) if type_ in ("colour", "shape") else list(scene)
    )
    if not pool:
        return None
    slots = words_for(language, rng.choice(pool))
    return _ask(rng, language, type_, language.answers[type_].format(**slots), **slots)


def _what_at(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question:
    if rng.random() < 0.2:
        free = [place for place in range(PLACES) if place not in {thing.place for thing in scene}]
        return _ask(rng, language, type_, language.answers["nothing"], place=language.places[rng.choice(free)])
    slots = words_for(language, rng.choice(scene))
    return _ask(rng, language, type_, language.answers[type_].format(**slots), place=slots["place"])


def _count(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question:
    return _ask(rng, language, type_, language.numbers[len(scene)])


def _count_of(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question:
    attribute = rng.choice(("colour", "shape"))
    present = [getattr(thing, attribute) for thing in scene]
    values = COLOURS if attribute == "colour" else SHAPES
    repeated = sorted({value for value in present if present.count(value) > 1})
    chance = rng.random()
    if chance < 0.2:
        value = rng.choice([value for value in values if value not in present])
    else:
        value = rng.choice(repeated if repeated and chance < 0.8 else present)
    at = values.index(value)
    number = language.numbers[present.count(value)]
    slots = {"colour": language.colours[at]} if attribute == "colour" else {"plural": language.plurals[at]}
    return _ask(rng, language, type_, number, form=f"count_{attribute}", **slots)


def _exist(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question:
    pairs = {(thing.colour, thing.shape) for thing in scene}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(pairs))
    else:  # half of the absent pairs share a colour or a shape with the scene
        near = rng.choice(scene)
        while True:
            colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
            if rng.random() < 0.5:
                colour, shape = rng.choice(((near.colour, shape), (colour, near.shape)))
            if (colour, shape) not in pairs:
                break
    slots = {"colour": language.colours[COLOURS.index(colour)], "shape": language.shapes[SHAPES.index(shape)]}
    return _ask(rng, language, type_, language.yes if (colour, shape) in pairs else language.no, **slots)


def _relation(rng: random.Random, scene: Scene, language: Language, type_: str) -> Question | None:
    """Left, right, above and below compare columns or rows; pairs that share one are not asked about it."""
    if len(scene) < 2:
        return None
    first, second = rng.sample(scene, 2)
    axes = [axis for axis in ("column", "row") if getattr(first, axis) != getattr(second, axis)]
    axis = rng.choice(axes)
    direction = {"column": 0, "row": 2}[axis] + rng.randint(0, 1)
    before = getattr(first, axis) < getattr(second, axis)
    truth = before == (direction % 2 == 0)
    slots, other = words_for(language, first), words_for(language, second)
    return _ask(
        rng,
        language,
        type_,
        language.yes_relation if truth else language.no_relation,
        **slots,
        colour2=other["colour"],
        shape2=other["shape"],
        direction=language.directions[direction],
    )


_MAKERS: dict[str, Callable[[random.Random, Scene, Language, str], Question | None]] = {
    "colour": _attribute,
    "shape": _attribute,
    "size": _attribute,
    "where": _attribute,
    "what_at": _what_at,
    "count": _count,
    "count_of": _count_of,
    "exist": _exist,
    "relation": _relation,
}


def ask(rng: random.Random, scene: Scene, language: str, type_: str) -> Question | None:
    """Make one question of a type, or None when this scene has no such question."""
    return _MAKERS[type_](rng, scene, WORDS[language], type_)


def ask_several(rng: random.Random, scene: Scene, language: str, number: int) -> list[Question]:
    """Make up to `number` different questions, types in random order, each type once before any twice."""
    questions: list[Question] = []
    types: list[str] = []
    for _ in range(3 * number):
        if len(questions) == number:
            break
        if not types:
            types = rng.sample(QUESTION_TYPES, len(QUESTION_TYPES))
        question = ask(rng, scene, language, types.pop())
        if question and question.text not in {known.text for known in questions}:
            questions.append(question)
    return questions


def caption(scene: Scene, language: str) -> str:
    """Describe a scene in the one canonical sentence of a language, objects in row-major order."""
    words = WORDS[language]
    if language == "en":
        parts = ["a {size} {colour} {shape} in the {place}".format(**words_for(words, thing)) for thing in scene]
        return "There is " + ", ".join(parts) + "."
    return "，".join("{place}有一个{size}的{colour}{shape}".format(**words_for(words, thing)) for thing in scene) + "。"


def caption_question(rng: random.Random, scene: Scene, language: str) -> Question:
    """Ask for the caption in one of a language's wordings."""
    return Question(CAPTION, rng.choice(WORDS[language].captions), caption(scene, language))


def read_caption(text: str) -> frozenset[Thing]:
    """Read the objects back out of a caption in either language; a clause without a whole object counts for nothing."""
    things = set()
    for words in WORDS.values():
        separator = ", " if words is ENGLISH else "，"
        for clause in text.strip().rstrip(".。").split(separator):
            found = [
                [i for i, word in enumerate(options) if word in clause]
                for options in (words.places, words.sizes, words.colours, words.shapes)
            ]
            if all(len(hits) == 1 for hits in found):
                place, size, colour, shape = (hits[0] for hits in found)
                things.add(Thing(place, ("small", "large")[size], COLOURS[colour], SHAPES[shape]))
    return frozenset(things)


def caption_f1(text: str, scene: Scene) -> float:
    """Return the F1 of whole objects (size, colour, shape and place all right) between a caption and a scene."""
    said, there = read_caption(text), frozenset(scene)
    return 2 * len(said & there) / (len(said) + len(there)) if said or there else 1.0
