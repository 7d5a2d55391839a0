"""Records -> questions that are asked alone, each as a first turn with its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from dianjing.data.record import Record, turns_alone

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
    """Return each turn of a record as a question of its own."""
    return [
        Question(
            id=record.id,
            turn=number,
            type=alone.types[0] if alone.types else UNTYPED if alone.images else TEXT_ONLY,
            text=alone.turns[0].question,
            images=alone.images,
            reference=alone.turns[0].answer,
        )
        for number, alone in enumerate(turns_alone(record))
    ]
