"""Does the model answer the question, or say the same of a picture whatever is asked?

After pretraining a LLaVA has only ever been shown captions, and tends to give one to any question.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dianjing.data.record import with_markers, without_markers
from dianjing.eval.score import CJK, token_f1, tokens
from dianjing.infer.questions import Question

CAPTION_TYPE = "caption"
"""The type of questions that ask for a caption; their references are captions of their pictures."""
CAPTION_F1 = 0.75
"""From this token F1 with a caption on, an answer is that caption; a word of it alone is not."""
REQUESTS = {False: "Describe the picture.", True: "请描述这张图片。"}
"""The request for a caption, by whether the question is Chinese."""


def caption_request(question: Question) -> Question:
    """Return the question that asks for a caption of the same pictures in the same language."""
    return _asking(question, REQUESTS[_is_cjk(question)])


def is_caption(answer: str, reference: str, captions: Sequence[str]) -> bool:
    """Return whether an answer is one of the captions of its picture rather than the reference."""
    near = max((token_f1(answer, caption) for caption in captions), default=0.0)
    return bool(tokens(answer)) and near >= CAPTION_F1 and near > token_f1(answer, reference)


def known_captions(questions: Sequence[Question], digest_of: Mapping[str, str]) -> list[list[str]]:
    """Return, for each question, the captions of its pictures among the references of the set."""
    found: dict[tuple[str, ...], list[str]] = {}
    for question in questions:
        if question.type == CAPTION_TYPE:
            found.setdefault(_pictures(question, digest_of), []).append(question.reference)
    return [found.get(_pictures(question, digest_of), []) for question in questions]


def other_questions(questions: Sequence[Question], digest_of: Mapping[str, str]) -> list[Question | None]:
    """Return, for each question with pictures, another question about the same pictures; None if there is none.

    It is one of the set that has these pictures and another reference, so that a model that looks and understands
    answers it differently. Where there is none, it is a question of another type in the same language, asked of
    these pictures; with a single type, any other question.
    """
    same: dict[tuple[str, ...], list[Question]] = {}
    by_type: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for question in sorted(questions, key=_text):
        if not question.images:
            continue
        same.setdefault(_pictures(question, digest_of), []).append(question)
        texts = by_type[_is_cjk(question)].setdefault(question.type, [])
        if _text(question) not in texts[-1:]:
            texts.append(_text(question))
    return [
        _other(question, same[_pictures(question, digest_of)], by_type[_is_cjk(question)]) if question.images else None
        for question in questions
    ]


def _other(question: Question, same: Sequence[Question], by_type: Mapping[str, list[str]]) -> Question | None:
    for one in same:
        if _text(one) != _text(question) and tokens(one.reference) != tokens(question.reference):
            return _asking(question, _text(one))
    types, own = sorted(by_type), by_type[question.type]
    position = bisect_left(own, _text(question))
    if len(types) > 1:
        others = by_type[types[(types.index(question.type) + 1) % len(types)]]
        text = others[position % len(others)]
    else:
        text = own[(position + 1) % len(own)]
    return _asking(question, text) if text != _text(question) else None


def _asking(question: Question, text: str) -> Question:
    return replace(question, text=with_markers(text, len(question.images)))


def _text(question: Question) -> str:
    return without_markers(question.text)


def _is_cjk(question: Question) -> bool:
    return bool(re.search(f"[{CJK}]", question.text))


def _pictures(question: Question, digest_of: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(digest_of[name] for name in question.images)
