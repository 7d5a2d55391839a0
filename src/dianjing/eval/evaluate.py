"""LoadedModel and questions -> answers with the right picture, with another one, with none; all scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from dianjing.data.record import without_markers
from dianjing.errors import DataError
from dianjing.eval.captions import CAPTION_TYPE, caption_request, is_caption, known_captions, other_questions
from dianjing.eval.losses import reference_losses
from dianjing.eval.score import METRICS, exact_match
from dianjing.eval.sight import digests, other_pictures
from dianjing.eval.summary import (
    CAPTION,
    NO_PICTURE,
    OTHER_PICTURE,
    RIGHT,
    SAME_ANSWER,
    WAYS,
    Scored,
    Summary,
    score,
    summarise,
    summarise_by_type,
)
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import LoadedModel
from dianjing.infer.pictures import PictureFiles
from dianjing.infer.questions import Question

T = TypeVar("T")

Answers = MutableMapping[tuple[str, str, tuple[str, ...]], str]
"""(folder of the pictures, question, their names) -> answer."""

TIMES_ASKED = 5
"""With its picture, with another, with none; another question about it; a caption of it."""
TIMES_MEASURED = 3
"""The loss of the reference with its picture, with another, with none."""


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
    loss: float | None = None
    """Of the reference, in nats a token."""
    loss_other_picture: float | None = None
    loss_no_picture: float | None = None

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
        losses = {
            RIGHT: self.loss,
            OTHER_PICTURE: self.loss_other_picture,
            NO_PICTURE: self.loss_no_picture,
        }
        return score(self.question.type, self.question.reference, answers, habits, losses)

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
    shown_foreign: int = 0
    """Questions that were shown a picture from outside the set as the other one."""

    @classmethod
    def of(cls, loaded: LoadedModel, answers: tuple[Answered, ...], shown_foreign: int) -> Report:
        """Return the report on a model's answers."""
        scored = [one.scored for one in answers]
        return cls(
            model=loaded.name,
            can_see=loaded.can_see,
            overall=summarise(scored),
            by_type=summarise_by_type(scored),
            answers=answers,
            shown_foreign=shown_foreign,
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything, answers included, as JSON values."""
        return {
            "model": self.model,
            "can_see": self.can_see,
            "overall": self.overall.to_json(),
            "shown_foreign": self.shown_foreign,
            "by_type": {name: summary.to_json() for name, summary in self.by_type.items()},
            "answers": [one.to_json() for one in self.answers],
        }


def times_asked(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Return how many answers and losses `evaluate` wants at most, for a progress bar."""
    pictured = sum(bool(question.images) for question in questions) if loaded.can_see else 0
    return 2 * len(questions) + (TIMES_ASKED - 1 + TIMES_MEASURED - 1) * pictured


def evaluate(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
    foreign: Path | None = None,
    with_losses: bool = True,
    said: Answers | None = None,
) -> Report:
    """Return what a model answers with the right pictures, with those of another record, and with none.

    `with_losses` measures the loss of each reference too. The model is also asked another question about the pictures,
    and for a caption of them. A model that cannot see is asked each question once: its answers do not depend on the
    picture. `foreign` is a picture file that is shown where the set has no other picture. `said` keeps answers: those
    in it are not asked for again.

    Raises:
        DataError: a question and its reference are too long for the model, or `foreign` is a picture of the set.
    """
    digest_of = digests((name for question in questions for name in question.images), image_root)
    changed = _Changed.of(questions, digest_of, image_root, foreign)
    files = PictureFiles(loaded)
    losses_of = partial(reference_losses, loaded, advance=advance, files=files)
    losses = _losses(loaded, questions, changed, losses_of) if with_losses else _unmeasured(questions)
    answers_to = _Asker(partial(answer_questions, loaded, max_new_tokens=max_new_tokens, files=files), said, advance)
    right = answers_to(questions, image_root)
    instead = other_questions(questions, digest_of) if loaded.can_see else [None] * len(questions)
    if loaded.can_see:
        with_other = _either(*(answers_to(wanted, root) for wanted, root in changed.others))
        with_none = answers_to(changed.blank, image_root)
    else:
        with_other, with_none = changed.as_right(right)
    with_other_question = answers_to(instead, image_root)
    again = partial(answers_to, image_root=image_root)
    captions = _captions(questions, digest_of, again) if loaded.can_see else [()] * len(questions)
    answered = tuple(
        Answered(
            question=question,
            answer=str(right[i]),
            answer_other_picture=with_other[i],
            answer_no_picture=with_none[i],
            other_question=without_markers(other.text) if (other := instead[i]) else None,
            answer_other_question=with_other_question[i],
            captions=captions[i],
            loss=losses[RIGHT][i],
            loss_other_picture=losses[OTHER_PICTURE][i],
            loss_no_picture=losses[NO_PICTURE][i],
        )
        for i, question in enumerate(questions)
    )
    return Report.of(loaded, answered, sum(one is not None for one in changed.with_foreign))


@dataclass(frozen=True, kw_only=True)
class _Changed:
    """The questions with other pictures and with none; None where there is no such question."""

    of_set: Sequence[Question | None]
    """With pictures of other records."""
    with_foreign: Sequence[Question | None]
    """With the foreign picture, where the set has no other one."""
    blank: Sequence[Question | None]
    roots: tuple[str, str]
    """Folders of the pictures of the set, and of the foreign one."""

    @classmethod
    def of(
        cls, questions: Sequence[Question], digest_of: dict[str, str], image_root: str, foreign: Path | None
    ) -> _Changed:
        if foreign and digests([foreign.name], str(foreign.parent))[foreign.name] in digest_of.values():
            raise DataError(f"{foreign}: this picture is in the data too; name one that is not")
        found = other_pictures(questions, digest_of)
        strange = [
            (foreign.name,) * len(question.images) if foreign and question.images and not images else None
            for question, images in zip(questions, found, strict=True)
        ]
        of_set, with_foreign = (
            [replace(one, images=images) if images else None for one, images in zip(questions, chosen, strict=True)]
            for chosen in (found, strange)
        )
        return cls(
            of_set=of_set,
            with_foreign=with_foreign,
            blank=[_without_pictures(question) if question.images else None for question in questions],
            roots=(image_root, str(foreign.parent) if foreign else image_root),
        )

    @property
    def others(self) -> list[tuple[Sequence[Question | None], str]]:
        """Return both kinds of questions with another picture, each with the folder of its pictures."""
        return list(zip((self.of_set, self.with_foreign), self.roots, strict=True))

    def as_right(self, right: Sequence[T | None]) -> tuple[list[T | None], list[T | None]]:
        """Return what a blind model gives with other pictures and with none: the same as with the right ones."""
        others = [bool(one or other) for one, other in zip(self.of_set, self.with_foreign, strict=True)]
        changed = (others, [one is not None for one in self.blank])
        with_other, with_none = (
            [one if asked else None for one, asked in zip(right, ways, strict=True)] for ways in changed
        )
        return with_other, with_none


def _unmeasured(questions: Sequence[Question]) -> dict[str, list[float | None]]:
    return {way: [None] * len(questions) for way in WAYS}


def _losses(
    loaded: LoadedModel,
    questions: Sequence[Question],
    changed: _Changed,
    losses_of: Callable[[Sequence[Question], str], list[float]],
) -> dict[str, list[float | None]]:
    """Return the loss of each reference by way of asking; None where it is not asked so."""

    def measured(wanted: Sequence[Question | None], root: str) -> list[float | None]:
        found = iter(losses_of([one for one in wanted if one], root))
        return [next(found) if one else None for one in wanted]

    image_root = changed.roots[0]
    right = measured(questions, image_root)
    if not loaded.can_see:
        other, none = changed.as_right(right)
        return {RIGHT: right, OTHER_PICTURE: other, NO_PICTURE: none}
    return {
        RIGHT: right,
        OTHER_PICTURE: _either(*(measured(wanted, root) for wanted, root in changed.others)),
        NO_PICTURE: measured(changed.blank, image_root),
    }


def _either(first: Sequence[T | None], second: Sequence[T | None]) -> list[T | None]:
    return [two if one is None else one for one, two in zip(first, second, strict=True)]


class _Asker:
    """Asks questions of one model, each once however often it is wanted."""

    def __init__(
        self,
        ask: Callable[..., list[str]],
        said: Answers | None,
        advance: Callable[[int], object],
    ) -> None:
        self._ask, self._advance = ask, advance
        self._said: Answers = {} if said is None else said

    def __call__(self, wanted: Sequence[Question | None], image_root: str) -> list[str | None]:
        """Return the answer to each question, its pictures in `image_root`; None for None."""
        keys = [_key(one, image_root) if one else None for one in wanted]
        new = {key: one for key, one in zip(keys, wanted, strict=True) if key and one and key not in self._said}
        self._advance(sum(one is not None for one in wanted) - len(new))

        def answered(question: Question, answer: str) -> None:
            self._said[_key(question, image_root)] = answer
            self._advance(1)

        if new:
            self._ask([*new.values()], image_root, answered=answered)
        return [self._said[key] if key else None for key in keys]


def _key(question: Question, image_root: str) -> tuple[str, str, tuple[str, ...]]:
    return image_root, question.text, question.images


def _without_pictures(question: Question) -> Question:
    return replace(question, text=without_markers(question.text), images=())


def _captions(
    questions: Sequence[Question],
    digest_of: Mapping[str, str],
    answers_to: Callable[[Sequence[Question | None]], list[str | None]],
) -> list[tuple[str, ...]]:
    """Return the captions that an answer to each question is compared with; none where a caption is asked for."""
    given = answers_to(
        [
            caption_request(question) if question.images and question.type != CAPTION_TYPE else None
            for question in questions
        ]
    )
    known = known_captions(questions, digest_of)
    return [(own, *found) if own is not None else () for own, found in zip(given, known, strict=True)]
