"""LoadedModel and questions -> answers with the right picture, with another one, with none, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dianjing.data.record import without_markers
from dianjing.eval.score import Scored, Summary, score, summarise, summarise_by_type
from dianjing.eval.sight import digests, other_pictures
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A question and what the model said; None where it was not asked."""

    question: Question
    answer: str
    answer_other_picture: str | None
    answer_no_picture: str | None

    @property
    def scored(self) -> Scored:
        """What the answers are worth."""
        return score(
            self.question.type,
            self.answer,
            self.question.reference,
            other_picture=self.answer_other_picture,
            no_picture=self.answer_no_picture,
        )


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
            "overall": asdict(self.overall),
            "by_type": {name: asdict(summary) for name, summary in self.by_type.items()},
            "answers": [
                {
                    **asdict(one.question),
                    "answer": one.answer,
                    "answer_other_picture": one.answer_other_picture,
                    "answer_no_picture": one.answer_no_picture,
                    "exact": one.scored.exact,
                    "f1": one.scored.f1,
                }
                for one in self.answers
            ],
        }


def times_asked(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Return how many answers `evaluate` will generate at most, for a progress bar."""
    pictured = sum(bool(question.images) for question in questions)
    return len(questions) + (2 * pictured if loaded.can_see else 0)


def evaluate(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Report:
    """Ask each question as it is and, where it has pictures, with those of another record and with none.

    A model that cannot see is asked once: its three answers are the same.
    """
    answers = answer_questions(loaded, questions, image_root, max_new_tokens, advance)

    def ask_changed(changed: dict[int, Question]) -> dict[int, str]:
        if not loaded.can_see:
            return {i: answers[i] for i in changed}
        given = answer_questions(loaded, list(changed.values()), image_root, max_new_tokens, advance)
        return dict(zip(changed, given, strict=True))

    digest_of = digests((name for question in questions for name in question.images), image_root)
    others = other_pictures(questions, digest_of)
    with_other = ask_changed({i: replace(questions[i], images=images) for i, images in enumerate(others) if images})
    with_none = ask_changed(
        {
            i: replace(question, text=without_markers(question.text), images=())
            for i, question in enumerate(questions)
            if question.images
        }
    )
    answered = tuple(
        Answered(
            question=question,
            answer=answers[i],
            answer_other_picture=with_other.get(i),
            answer_no_picture=with_none.get(i),
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
