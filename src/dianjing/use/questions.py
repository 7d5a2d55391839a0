"""Records -> questions that are asked alone, each as a first turn with its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dianjing.constants import IMAGE_MARKER
from dianjing.data.record import Record

TEXT_ONLY = "text only"
UNTYPED = "question"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One turn of a record, asked as a first turn with its pictures; `text` holds a marker for each."""

    id: str
    turn: int
    type: str
    text: str
    images: tuple[str, ...]
    reference: str


def questions_of(record: Record) -> list[Question]:
    """Return each turn of a record as a question of its own.

    A turn without a marker is about the pictures shown so far, so they are put in front of it.
    """
    questions = []
    shown = 0
    for number, turn in enumerate(record.turns):
        own = turn.question.count(IMAGE_MARKER)
        images = record.images[shown : shown + own] if own else record.images[:shown]
        shown += own
        default = UNTYPED if images else TEXT_ONLY
        questions.append(
            Question(
                id=record.id,
                turn=number,
                type=record.types[number] if record.types else default,
                text=turn.question if own else with_markers(turn.question, len(images)),
                images=images,
                reference=turn.answer,
            )
        )
    return questions


def with_markers(question: str, count: int) -> str:
    """Return the question with `count` pictures in front, as LLaVA writes it."""
    return (f"{IMAGE_MARKER}\n" * count + question).strip() if count else question


def without_markers(question: str) -> str:
    """Return the question alone, without its pictures."""
    return question.replace(IMAGE_MARKER, "").strip()
