"""Benchmark files in their makers' layouts, their questions made here: 24 items each, and answers of all sorts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

NUMBER = 24
COLOURS = ("red", "green", "blue", "white")
LETTERS = "ABCD"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 9 % 256, number * 31 % 256, 200)).save(file, "PNG")
    return file.getvalue()


def letter_answers(right: str, colour: str) -> list[str]:
    """Return ways to answer a question with options: right, wrong, chatty, lower case, Chinese, full width, empty."""
    return [
        right,
        f"{right}.",
        f"({right})",
        f"{right}. {colour}",
        f"The answer is {right}.",
        colour,
        f"It is {colour.upper()}, I think.",
        f"答案是{right}",
        f"选{right}。",
        right.lower(),
        chr(ord(right) + 0xFEE0),
        "",
        f"A cat sits there, so {right}",
        "I cannot tell.",
        "红色",
        f"Not A or B but {right}",
        f"{right}:",
        f" {right} ",
    ]


WORD_ANSWERS: list[Callable[[str], str]] = [
    lambda word: word,
    lambda word: word.upper(),
    lambda word: f"{word}.",
    lambda word: f"the {word}",
    lambda word: "",
    lambda word: f"It is {word}, I think.",
    lambda word: "红色",
    lambda word: f"{word}!",
    lambda word: f"{word}\n",
    lambda word: "don't know",
    lambda word: "ｒｅｄ",
]
YES_NO = [
    "yes",
    "Yes",
    "no",
    "No.",
    "YES!",
    "no, there is not",
    "",
    "Yes, there is a dog.",
    "n",
    "y",
    "是",
    "ｙｅｓ",
    "maybe",
]


def letters_for(rights: list[tuple[str, str]]) -> list[str]:
    """Return an answer for each question: every way in turn."""
    return [letter_answers(*right)[i % 18] for i, right in enumerate(rights)]


def mmbench_rows(turned: bool = True) -> list[dict[str, Any]]:
    """Return rows of an MMBench TSV: 24 questions, and for the even ones a copy with two options exchanged."""
    rows: list[dict[str, Any]] = []
    for i in range(NUMBER):
        options = {letter: COLOURS[(i + n) % 4] for n, letter in enumerate(LETTERS)}
        row = {"index": i, "question": f"Which colour is thing {i}?", "hint": "Look well." if i % 3 == 0 else "nan"}
        row |= options | {"answer": LETTERS[i % 4], "category": f"kind {i % 3}", "l2-category": f"group {i % 2}"}
        row |= {"source": "made", "split": "dev", "image": base64.b64encode(picture(i)).decode()}
        rows.append(row)
        if turned and i % 2 == 0:
            swapped = {**options, "A": options["B"], "B": options["A"]}
            answer = {"A": "B", "B": "A"}.get(row["answer"], row["answer"])
            rows.append({**row, **swapped, "index": i + 1_000_000, "answer": answer, "image": str(i)})
    return sorted(rows, key=lambda row: row["index"])


def write_tsv(file: Path, rows: list[dict[str, Any]]) -> Path:
    names = [*rows[0]]
    lines = ["\t".join(names), *("\t".join(str(row[name]) for name in names) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def pope_rows() -> list[dict[str, Any]]:
    return [
        {"question_id": i, "image": f"{i}.png", "text": f"Is there a thing {i}?", "label": ("yes", "no")[i // 3 % 2]}
        for i in range(NUMBER)
    ]


def write_pope(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("random", "popular", "adversarial"):
        lines = "".join(json.dumps(row) + "\n" for row in pope_rows())
        (folder / f"coco_pope_{split}.json").write_text(lines)
    for i in range(NUMBER):
        (folder / f"{i}.png").write_bytes(picture(i))
    return folder


def write_mme(folder: Path) -> Path:
    for category in ("existence", "code_reasoning", "OCR"):
        place = folder / category
        place.mkdir(parents=True)
        for i in range(8):
            (place / f"{i}.png").write_bytes(picture(i))
            text = f"Is it {i}? Please answer yes or no.\tYes\nIs it {i + 1}? Please answer yes or no.\tNo\n"
            (place / f"{i}.txt").write_text(text)
    return folder


def vqa_answers(i: int) -> list[str]:
    """Return ten people's answers: six agree, the others say several things."""
    return [f"{COLOURS[i % 4]}"] * 6 + ["Two", "a 2.", COLOURS[(i + 1) % 4], "dont know"]


def write_vqav2(folder: Path) -> Path:
    questions = [{"image_id": i, "question": f"What is {i}?", "question_id": i * 1000} for i in range(NUMBER)]
    annotations = [
        {
            "question_id": i * 1000,
            "answer_type": ("other", "number")[i % 2],
            "answers": [
                {"answer": said, "answer_confidence": "yes", "answer_id": n + 1}
                for n, said in enumerate(vqa_answers(i))
            ],
        }
        for i in range(NUMBER)
    ]
    file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return file


def write_textvqa(folder: Path) -> Path:
    data = [
        {"question_id": i, "image_id": f"pic{i}", "question": f"what is written on {i}?", "answers": vqa_answers(i)}
        for i in range(NUMBER)
    ]
    file = folder / "TextVQA_0.5.1_val.json"
    file.write_text(json.dumps({"data": data}))
    return file


def write_vizwiz(folder: Path) -> Path:
    data = [
        {
            "image": f"VizWiz_val_{i:08d}.jpg",
            "question": f"what is this {i}?",
            "answers": [{"answer": said, "answer_confidence": "yes"} for said in vqa_answers(i)],
            "answer_type": "other",
            "answerable": 1,
        }
        for i in range(NUMBER)
    ]
    file = folder / "val.json"
    file.write_text(json.dumps(data))
    return file


def write_gqa(folder: Path) -> Path:
    content = {
        f"20{i}": {
            "question": f"What is {i}?",
            "imageId": f"n{i}",
            "answer": COLOURS[i % 4],
            "types": {"structural": ("query", "verify")[i % 2]},
        }
        for i in range(NUMBER)
    }
    file = folder / "testdev_balanced_questions.json"
    file.write_text(json.dumps(content))
    return file


CHART_LABELS = ["10", "12.5", "40%", "Red", "0", "1999"]


def write_chartqa(folder: Path) -> Path:
    for kind in ("human", "augmented"):
        rows = [
            {"imgname": f"{i}.png", "query": f"How much is {i}?", "label": CHART_LABELS[i % 6]} for i in range(NUMBER)
        ]
        (folder / f"test_{kind}.json").write_text(json.dumps(rows))
    return folder


CHART_ANSWERS = ["10.4", "13.2", "0.41", "red", "0", "2100", "", "十", "ten", "41%", "1999.", " 10"]


def write_scienceqa(folder: Path) -> Path:
    problems = {
        str(i): {
            "question": f"Which is {i}?",
            "choices": [*COLOURS[: 2 + i % 3]],
            "answer": i % 2,
            "hint": "A hint." if i % 2 else "",
            "image": "image.png" if i < NUMBER else None,
            "subject": ("natural science", "social science")[i % 2],
            "split": "test",
        }
        for i in range(NUMBER + 3)
    }
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": [*problems], "train": []}))
    return folder / "problems.json"


def write_seed(folder: Path) -> Path:
    questions = [
        {
            "question_id": str(i),
            "question": f"What is {i}?",
            **{f"choice_{letter.lower()}": COLOURS[n] for n, letter in enumerate(LETTERS)},
            "answer": LETTERS[i % 4],
            "data_id": f"{i}.png",
            "data_type": "image" if i < NUMBER else "video",
            "question_type_id": 1 + i % 2,
        }
        for i in range(NUMBER + 2)
    ]
    types = {"Scene Understanding": 1, "Instance Identity": 2}
    file = folder / "SEED-Bench.json"
    file.write_text(json.dumps({"questions": questions, "question_type": types}))
    return file


def write_ai2d(folder: Path) -> Path:
    (folder / "questions").mkdir(parents=True)
    for i in range(NUMBER):
        question = {"answerTexts": [*COLOURS], "correctAnswer": i % 4, "questionId": f"q{i}", "abcLabel": bool(i % 2)}
        content = {"imageName": f"{i}.png", "questions": {f"What is {i}?": question}}
        (folder / "questions" / f"{i:03d}.png.json").write_text(json.dumps(content))
    return folder


def mmmu_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"validation_{('Art', 'Math', 'Art_Theory')[i % 3]}_{i}",
            "question": f"What is <image 1> at {i}?",
            "options": str([*COLOURS]),
            "answer": LETTERS[i % 4],
            "question_type": "multiple-choice",
            "image_1": {"bytes": picture(i), "path": None},
        }
        for i in range(NUMBER)
    ]


def write_refcoco(folder: Path) -> Path:
    rows = [
        {"img_id": f"COCO_train2014_{i:012d}_0.jpg", "sents": f"thing {i}", "bbox": [i, 2 * i, 40, 30], "height": 100}
        | {"width": 200}
        for i in range(NUMBER)
    ]
    file = folder / "refcoco.json"
    file.write_text(json.dumps(rows))
    return file
