"""LoadedModel and questions -> answers with the right picture, with another one, with none; all scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

from dianjing.data.record import without_markers
from dianjing.eval.captions import CAPTION_TYPE, caption_request, is_caption, known_captions, other_questions
from dianjing.eval.score import METRICS, exact_match
from dianjing.eval.sight import digests, other_pictures
from dianjing.eval.summary import (
    CAPTION,
    NO_PICTURE,
    OTHER_PICTURE,
    RIGHT,
    SAME_ANSWER,
    Scored,
    Summary,
    score,
    summarise,
    summarise_by_type,
)
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question

TIMES_ASKED = 5
"""With its picture, with another, with none; another question about it; a caption of it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and what the model said; None where it was not asked."""

    question: Question
    answer: str
    answer_other_picture: str | None
    answer_no_picture: str | None
    other_question: str | None = None
    """Another question about the same picture."""
    answer_other_question: str | None = None
    captions: tuple[str, ...] = ()
    """Of its pictures: the one that the model gives on request, and those in the data."""

    @cached_property
    def scored(self) -> Scored:
        """The scores of the answers."""
        habits: dict[str, float] = {}
        if self.captions:
            habits[CAPTION] = float(is_caption(self.answer, self.question.reference, self.captions))
        if self.answer_other_question is not None:
            habits[SAME_ANSWER] = float(exact_match(self.answer, self.answer_other_question))
        answers = {
            RIGHT: self.answer,
            OTHER_PICTURE: self.answer_other_picture,
            NO_PICTURE: self.answer_no_picture,
        }
        return score(self.question.type, self.question.reference, answers, habits)

    def to_json(self) -> dict[str, Any]:
        """Return the question, the answers and the values of the one with the right picture."""
        question = self.question
        values = {
            metric.answer_key or name: metric.measure(self.answer, question.reference)
            for name, metric in METRICS.items()
        }
        said = {name: value for name, value in asdict(self).items() if name != "question"}
        return {**asdict(question), **said, **values}


@dataclass(frozen=True, kw_only=True)
class Report:
    """How well a model answers, and how much of that it owes to the picture."""

    model: str
    can_see: bool
    overall: Summary
    by_type: dict[str, Summary]
    answers: tuple[Answered, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything, answers included, as JSON values."""
        return {
            "model": self.model,
            "can_see": self.can_see,
            "overall": self.overall.to_json(),
            "by_type": {name: summary.to_json() for name, summary in self.by_type.items()},
            "answers": [one.to_json() for one in self.answers],
        }


def times_asked(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Return how many answers `evaluate` wants at most, for a progress bar."""
    pictured = sum(bool(question.images) for question in questions)
    return len(questions) + ((TIMES_ASKED - 1) * pictured if loaded.can_see else 0)


def evaluate(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Report:
    """Return what a model answers with the right pictures, with those of another record, and with none.

    It is also asked another question about the pictures, and for a caption of them. A model that cannot see is asked
    each question once: its answers do not depend on the picture.
    """
    answers_to = _Asker(loaded, image_root, max_new_tokens, advance)
    digest_of = digests((name for question in questions for name in question.images), image_root)
    right = answers_to(questions)
    others = [
        replace(question, images=images) if images else None
        for question, images in zip(questions, other_pictures(questions, digest_of), strict=True)
    ]
    blank = [_without_pictures(question) if question.images else None for question in questions]
    instead = other_questions(questions, digest_of) if loaded.can_see else [None] * len(questions)
    with_other, with_none = (
        answers_to(changed) if loaded.can_see else [changed[i] and right[i] for i in range(len(questions))]
        for changed in (others, blank)
    )
    with_other_question = answers_to(instead)
    captions = _captions(questions, digest_of, answers_to) if loaded.can_see else [()] * len(questions)
    answered = tuple(
        Answered(
            question=question,
            answer=str(right[i]),
            answer_other_picture=with_other[i],
            answer_no_picture=with_none[i],
            other_question=without_markers(other.text) if (other := instead[i]) else None,
            answer_other_question=with_other_question[i],
            captions=captions[i],
        )
        for i, question in enumerate(questions)
    )
    scored = [one.scored for one in answered]
    return Report(
        model=loaded.name,
        can_see=loaded.can_see,
        overall=summarise(scored),
        by_type=summarise_by_type(scored),
        answers=answered,
    )


class _Asker:
    """Asks questions of one model, each once however often it is wanted."""

    def __init__(
        self, loaded: LoadedModel, image_root: str, max_new_tokens: int, advance: Callable[[int], object]
    ) -> None:
        self._ask = partial(
            answer_questions, loaded, image_root=image_root, max_new_tokens=max_new_tokens, advance=advance
        )
        self._advance = advance
        self._said: dict[tuple[str, tuple[str, ...]], str] = {}

    def __call__(self, wanted: Sequence[Question | None]) -> list[str | None]:
        """Return the answer to each question; None for None."""
        new = {(one.text, one.images): one for one in wanted if one and (one.text, one.images) not in self._said}
        self._said.update(zip(new, self._ask(list(new.values())), strict=True))
        self._advance(sum(one is not None for one in wanted) - len(new))
        return [self._said[one.text, one.images] if one else None for one in wanted]


def _without_pictures(question: Question) -> Question:
    return replace(question, text=without_markers(question.text), images=())


def _captions(questions: Sequence[Question], digest_of: Mapping[str, str], answers_to: _Asker) -> list[tuple[str, ...]]:
    """Return the captions that an answer to each question is compared with; none where a caption is asked for."""
    given = answers_to(
        [
            caption_request(question) if question.images and question.type != CAPTION_TYPE else None
            for question in questions
        ]
    )
    known = known_captions(questions, digest_of)
    return [(own, *found) if own is not None else () for own, found in zip(given, known, strict=True)]
