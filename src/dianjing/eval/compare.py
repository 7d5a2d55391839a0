"""The answers of several models, side by side -> one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from PIL.Image import Image, Resampling

from dianjing.data.record import without_markers
from dianjing.eval.score import contains_reference, exact_match, token_f1, tokens
from dianjing.eval.summary import RIGHT, SIGHT, WAYS, Summary, score, summarise, summarise_by_type
from dianjing.infer.questions import Question
from dianjing.language import language, say

if TYPE_CHECKING:
    from dianjing.eval.evaluate import Report

THUMBNAIL_PIXELS = 360
"""Longer side of a picture on the page."""
CLOSE_F1 = 0.5
"""From this token F1 on an answer that is not exact counts as close, if its reference is long."""
LONG_REFERENCE = 10
"""Words of a reference that can be missed in part or said in other words; in a shorter one a wrong word is a wrong
answer."""
MARKS = {"right": "✓ right", "close": "≈ close", "other": "○ other words", "wrong": "✗ wrong"}
"""Verdict -> what the page says."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model: its answers, one a question, and what they are worth."""

    name: str
    can_see: bool
    answers: Sequence[str]
    summary: Summary
    by_type: Mapping[str, Summary]

    @classmethod
    def of_answers(cls, name: str, questions: Sequence[Question], answers: Sequence[str]) -> Column:
        """Return the column of a model that can see and was asked with the right pictures only."""
        scored = [
            score(one.type, one.reference, {RIGHT: answer}) for one, answer in zip(questions, answers, strict=True)
        ]
        by_type = summarise_by_type(scored)
        return cls(name=name, can_see=True, answers=answers, summary=summarise(scored), by_type=by_type)

    @classmethod
    def of_report(cls, report: Report, name: str = "", first: int | None = None) -> Column:
        """Return the column of an evaluated model, or of its `first` answers."""
        answered = report.answers[:first]
        scored = [one.scored for one in answered]
        return cls(
            name=name or report.model,
            can_see=report.can_see,
            answers=[one.answer for one in answered],
            summary=summarise(scored),
            by_type=summarise_by_type(scored),
        )


def page(title: str, questions: Sequence[Question], columns: Sequence[Column], pictures: Mapping[str, Image]) -> str:
    """Return the HTML page; questions that stand next to each other and share their pictures share a card."""
    numbered = list(enumerate(questions))
    cards = [
        {
            "id": ", ".join(dict.fromkeys(question.id for _, question in group)),
            "pictures": [{"name": name, "source": thumbnail(pictures[name])} for name in images],
            "rows": [_row(i, question, columns) for i, question in group],
        }
        for images, group in ((images, list(group)) for images, group in groupby(numbered, lambda p: p[1].images))
    ]
    source = files("dianjing.eval").joinpath("compare.html.j2").read_text(encoding="utf-8")
    template = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    return template.render(
        title=title,
        columns=columns,
        cards=cards,
        number=len(questions),
        language=language(),
        say=say,
        ways=[say(way) for way in (*WAYS.values(), SIGHT)],
        exact=any(column.summary.exact_says_something for column in columns),
        marks={verdict: say(mark) for verdict, mark in MARKS.items()},
        types=list(dict.fromkeys(question.type for question in questions)),
    )


def thumbnail(image: Image) -> str:
    """Return a picture as a data URI, scaled down to the page's size; small ones stay exact."""
    file = io.BytesIO()
    if max(image.size) <= THUMBNAIL_PIXELS:
        image.save(file, "PNG", optimize=True)
        return _data_uri("png", file)
    image = image.copy()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Resampling.LANCZOS)
    image.save(file, "JPEG", quality=85, optimize=True)
    return _data_uri("jpeg", file)


def _data_uri(kind: str, file: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _row(i: int, question: Question, columns: Sequence[Column]) -> dict[str, Any]:
    answers = [{"text": column.answers[i], **verdict(column.answers[i], question.reference)} for column in columns]
    return {
        "type": question.type,
        "question": without_markers(question.text),
        "reference": question.reference,
        "answers": answers,
        "disagree": len({answer["verdict"] for answer in answers}) > 1,
        "unlike": any(answer["verdict"] != "right" for answer in answers),
    }


def verdict(answer: str, reference: str) -> dict[str, Any]:
    """Return "right", "close", "other" or "wrong", and the token F1.

    Only what can be known to be wrong is wrong: no answer, or one that does not say a short reference.
    """
    f1, long = token_f1(answer, reference), len(tokens(reference)) >= LONG_REFERENCE
    if exact_match(answer, reference):
        return {"verdict": "right", "f1": f1}
    if contains_reference(answer, reference) or (long and f1 >= CLOSE_F1):
        return {"verdict": "close", "f1": f1}
    return {"verdict": "other" if long and tokens(answer) else "wrong", "f1": f1}
