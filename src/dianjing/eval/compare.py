"""The answers of several models, side by side -> one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL.Image import Image, Resampling

from dianjing.data.record import without_markers
from dianjing.eval.score import Summary, exact_match, score, summarise, token_f1, tokens
from dianjing.infer.questions import Question
from dianjing.pictures.picture import opaque

THUMBNAIL_PIXELS = 360
"""Longer side of a picture on the page."""
CLOSE_F1 = 0.5
"""From this token F1 on an answer that is not exact counts as close, if its reference is long."""
LONG_REFERENCE = 10
"""Words of a reference that can be missed in part; in a shorter one a wrong word is a wrong answer."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model: its answers, one a question, and their summary."""

    name: str
    can_see: bool
    answers: Sequence[str]
    summary: Summary


def column(name: str, can_see: bool, questions: Sequence[Question], answers: Sequence[str]) -> Column:
    """Return the column of a model that gave these answers."""
    scored = [score(one.type, answer, one.reference) for one, answer in zip(questions, answers, strict=True)]
    return Column(name=name, can_see=can_see, answers=answers, summary=summarise(scored))


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
    return template.render(title=title, columns=columns, cards=cards, number=len(questions))


def thumbnail(image: Image) -> str:
    """Return a picture as a data URI, scaled down to the page's size; small ones stay exact."""
    file = io.BytesIO()
    image = opaque(image)
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
        "wrong": any(answer["verdict"] != "right" for answer in answers),
    }


def verdict(answer: str, reference: str) -> dict[str, Any]:
    """Return "right", "close" or "wrong", and the token F1."""
    f1 = token_f1(answer, reference)
    if exact_match(answer, reference):
        return {"verdict": "right", "f1": f1}
    close = f1 >= CLOSE_F1 and len(tokens(reference)) >= LONG_REFERENCE
    return {"verdict": "close" if close else "wrong", "f1": f1}
