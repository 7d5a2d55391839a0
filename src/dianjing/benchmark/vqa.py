"""VQAv2, TextVQA, VizWiz, GQA and ChartQA: a word or a phrase is the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dianjing.benchmark.item import SHORT, Benchmark, Item, by_item
from dianjing.benchmark.rows import Row, files_in, objects_in, part, read_json, rows_of
from dianjing.benchmark.short_answer import chart_agrees, evalai_words, same_words, vqa_score, vqa_words
from dianjing.errors import DataError

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _answers(row: Row, value: Any) -> list[str]:
    """Return people's answers: a list of texts, or of objects with "answer"."""
    said = [one.get("answer") if isinstance(one, dict) else one for one in value or []]
    if not all(isinstance(one, str) for one in said):
        raise DataError(f'{row.where}: "answers" holds something that is not text; download the file again')
    return [str(one) for one in said]


def read_vqav2(file: Path) -> list[Item]:
    """Return the questions of v2_OpenEnded_mscoco_SPLIT_questions.json; v2_mscoco_SPLIT_annotations.json next to it
    has the answers, if they are published."""
    content = read_json(file)
    rows = rows_of(file, part(file, content, "questions"), ("image_id", "question", "question_id"))
    published = file.with_name(file.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    known: dict[Any, Row] = {}
    if published != file and published.is_file():
        given = part(published, read_json(published), "annotations")
        known = {row.values["question_id"]: row for row in rows_of(published, given, ("question_id", "answers"))}
    split = str(content.get("data_subtype") or file.stem.split("_")[-2])
    items: list[Item] = []
    for row in rows:
        answered = known.get(row.values["question_id"])
        if known and answered is None:
            raise DataError(f"{row.where}: {published.name} has no answers to it; download both files again")
        items.append(
            Item(
                id=str(row.values["question_id"]),
                text=row.text("question") + SHORT,
                pictures=(f"COCO_{split.replace('test-dev2015', 'test2015')}_{int(row.values['image_id']):012d}.jpg",),
                type=str(answered.values.get("answer_type", "question")) if answered else "question",
                row={**row.values, "answers": _answers(answered, answered.values["answers"]) if answered else []},
            )
        )
    return items


def score_vqav2(item: Item, answer: str) -> float:
    """Return VQA's accuracy of one answer."""
    given, *wanted = (
        vqa_words(text.replace("\n", " ").replace("\t", " ").strip()) for text in (answer, *item.row["answers"])
    )
    return vqa_score(given, wanted)


def read_textvqa(file: Path) -> list[Item]:
    """Return the questions of TextVQA_0.5.1_val.json."""
    rows = rows_of(file, part(file, read_json(file), "data"), ("image_id", "question", "question_id"))
    return [
        Item(
            id=str(row.values["question_id"]),
            text=row.text("question").capitalize() + SHORT,
            pictures=(f"{row.text('image_id')}.jpg",),
            type="question",
            row={**row.values, "answers": _answers(row, row.values.get("answers"))},
        )
        for row in rows
    ]


def read_vizwiz(file: Path) -> list[Item]:
    """Return the questions of VizWiz's val.json or test.json."""
    return [
        Item(
            id=row.text("image"),
            text=row.text("question").capitalize() + UNANSWERABLE + SHORT,
            pictures=(row.text("image"),),
            type=str(row.values.get("answer_type") or "question"),
            row={**row.values, "answers": _answers(row, row.values.get("answers"))},
        )
        for row in rows_of(file, read_json(file), ("image", "question"))
    ]


def score_words(item: Item, answer: str) -> float:
    """Return the accuracy of TextVQA and VizWiz."""
    given, *wanted = (evalai_words(text) for text in (answer, *item.row["answers"]))
    return vqa_score(given, wanted)


def read_gqa(file: Path) -> list[Item]:
    """Return the questions of testdev_balanced_questions.json."""
    content = objects_in(file, read_json(file))
    rows = rows_of(file, [*content.values()], ("question", "imageId"))
    return [
        Item(
            id=number,
            text=row.text("question") + SHORT,
            pictures=(f"{row.values['imageId']}.jpg",),
            type=str((row.values.get("types") or {}).get("structural") or "question"),
            row={"answer": str(row.values.get("answer") or "")},
        )
        for number, row in zip(content, rows, strict=True)
    ]


def read_chartqa(file: Path) -> list[Item]:
    """Return the questions of test_human.json and test_augmented.json: one of them, or the folder with both."""
    items: list[Item] = []
    for one in files_in(file, ".json"):
        for number, row in enumerate(rows_of(one, read_json(one), ("imgname", "query", "label")), 1):
            items.append(
                Item(
                    id=f"{one.stem}/{number}",
                    text=row.text("query") + "\nAnswer the question with a single word.",
                    pictures=(row.text("imgname"),),
                    type=one.stem.rpartition("_")[2],
                    row={"answer": row.text("label")},
                )
            )
    return items


def _vqav2_submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    said = [
        {"question_id": item.row["question_id"], "answer": vqa_words(answer)}
        for item, answer in zip(items, answers, strict=True)
    ]
    return json.dumps(said, ensure_ascii=False)


def _textvqa_submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    said = [
        {"question_id": item.row["question_id"], "answer": evalai_words(answer)}
        for item, answer in zip(items, answers, strict=True)
    ]
    return json.dumps(said, ensure_ascii=False)


def _vizwiz_submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    said = [{"image": item.id, "answer": evalai_words(answer)} for item, answer in zip(items, answers, strict=True)]
    return json.dumps(said, ensure_ascii=False)


def _answered(item: Item) -> bool:
    return bool(item.row["answers"])


THIRDS = "a third for each of the people who gave the same answer, at most 1; "
VQAV2 = Benchmark(
    about="VQAv2: v2_OpenEnded_mscoco_SPLIT_questions.json, the annotations next to it",
    read=read_vqav2,
    judge=by_item(score_vqav2),
    rule=THIRDS + "punctuation, articles and case do not count, numbers are digits",
    has_reference=_answered,
    submission=("vqav2.json", _vqav2_submission),
)
TEXTVQA = Benchmark(
    about="TextVQA: TextVQA_0.5.1_val.json",
    read=read_textvqa,
    judge=by_item(score_words),
    rule=THIRDS + "as VQAv2, commas and question marks gone before",
    has_reference=_answered,
    submission=("textvqa.json", _textvqa_submission),
)
VIZWIZ = Benchmark(
    about="VizWiz: val.json or test.json",
    read=read_vizwiz,
    judge=by_item(score_words),
    rule=THIRDS + "as TextVQA",
    has_reference=_answered,
    submission=("vizwiz.json", _vizwiz_submission),
)
GQA = Benchmark(
    about="GQA: testdev_balanced_questions.json",
    read=read_gqa,
    judge=by_item(lambda item, answer: float(same_words(answer, item.row["answer"]))),
    rule="equal but for case and punctuation",
    has_reference=lambda item: bool(item.row["answer"]),
)
CHARTQA = Benchmark(
    about="ChartQA: test_human.json, test_augmented.json, or the folder with them",
    read=read_chartqa,
    judge=by_item(lambda item, answer: float(chart_agrees(answer, item.row["answer"]))),
    rule="numbers within 5 %, everything else equal but for case",
)
