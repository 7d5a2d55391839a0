"""ScienceQA, SEED-Bench, AI2D and MMMU: one of several options is the answer."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dianjing.benchmark.choice_letter import mmmu_letter
from dianjing.benchmark.item import LETTER, LETTERS, SHORT, Benchmark, Item, by_item, with_options
from dianjing.benchmark.rows import Row, files_in, objects_in, part, read_json, rows_of
from dianjing.benchmark.short_answer import mmmu_forms, mmmu_open, same_words
from dianjing.errors import ConfigError, DataError
from dianjing.extras import install


def _lettered(row: Row, texts: Any) -> dict[str, str]:
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"{row.where}: its options are not a list of two or more; download the file again")
    return {LETTERS[i]: str(text) for i, text in enumerate(texts)}


def _letter_of(row: Row, number: Any, options: Mapping[str, str]) -> str:
    if not isinstance(number, int | str) or not str(number).isdigit() or int(number) >= len(options):
        raise DataError(f"{row.where}: its answer is {number!r}, not the number of an option; download the file again")
    return LETTERS[int(number)]


def read_scienceqa(file: Path) -> list[Item]:
    """Return the questions with pictures of problems.json's test split, which pid_splits.json next to it names."""
    problems, splits = read_json(file), file.with_name("pid_splits.json")
    test = part(splits, read_json(splits), "test") if splits.is_file() else [*problems]
    items: list[Item] = []
    for number in test:
        (row,) = rows_of(file, [part(file, problems, number)], ("question", "choices", "answer"))
        row = Row(f'{file}: problem "{number}"', row.values)
        if not row.values.get("image"):
            continue
        options, hint = _lettered(row, row.values["choices"]), str(row.values.get("hint") or "")
        context = f"Context: {hint}\n" if hint else ""
        items.append(
            Item(
                id=str(number),
                text=with_options(context + row.text("question"), options) + LETTER,
                pictures=(f"{row.values.get('split', 'test')}/{number}/{row.values['image']}",),
                type=str(row.values.get("subject") or "question"),
                row={"answer": _letter_of(row, row.values["answer"], options)},
            )
        )
    return items


def score_scienceqa(item: Item, answer: str) -> float:
    """Return 1 for the letter alone, or for an answer that begins with it, a capital, and a full stop."""
    letter = answer.strip()
    if len(letter) >= 2 and letter[0].isupper() and letter[1] == ".":
        letter = letter[0]
    return float(letter.lower() == item.row["answer"].lower())


def read_seed(file: Path) -> list[Item]:
    """Return the questions about single pictures of SEED-Bench.json."""
    content = read_json(file)
    questions = part(file, content, "questions")
    names = {number: name for name, number in objects_in(file, content.get("question_type") or {}).items()}
    columns = ("question", "choice_a", "choice_b", "data_id", "data_type")
    items: list[Item] = []
    for row in rows_of(file, questions, columns):
        if row.values["data_type"] != "image":
            continue
        options = row.options([f"choice_{letter}" for letter in "abcd"])
        kind = row.values.get("question_type_id")
        items.append(
            Item(
                id=str(row.values.get("question_id")),
                text=with_options(row.text("question"), options) + LETTER,
                pictures=(row.text("data_id"),),
                type=str(names.get(kind, kind)),
                row={"answer": row.letter("answer", options)},
            )
        )
    return items


def _seed_submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    said = [
        {"question_id": item.id, "prediction": answer.strip()[:1]} for item, answer in zip(items, answers, strict=True)
    ]
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in said)


def read_ai2d(folder: Path) -> list[Item]:
    """Return the questions of the folder ai2d: questions/*.json, of the test pictures if ai2d_test_ids.csv is there."""
    chosen = folder / "ai2d_test_ids.csv"
    test = set(chosen.read_text(encoding="utf-8").split()) if chosen.is_file() else None
    items: list[Item] = []
    for file in files_in(folder / "questions", ".json"):
        content = objects_in(file, read_json(file))
        image = str(content.get("imageName") or file.stem)
        if test is not None and image.partition(".")[0] not in test:
            continue
        for question, values in objects_in(file, part(file, content, "questions")).items():
            row = Row(f"{file}: {question[:60]!r}", values if isinstance(values, dict) else {})
            options = _lettered(row, row.values.get("answerTexts"))
            items.append(
                Item(
                    id=str(row.values.get("questionId") or f"{image}/{question}"),
                    text=with_options(question, options) + LETTER,
                    pictures=(f"images/{image}",),
                    type="letters in the picture" if row.values.get("abcLabel") else "question",
                    row={"answer": _letter_of(row, row.values.get("correctAnswer"), options)},
                )
            )
    return items


def score_ai2d(item: Item, answer: str) -> float:
    """Return 1 for the letter alone, case and punctuation aside, or for a capital and a full stop at the beginning."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return float(same_words(found[1] if found else answer, item.row["answer"]))


def read_mmmu(folder: Path) -> list[Item]:
    """Return the questions of MMMU's parquet files: one, or a folder with those of all subjects."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(f"MMMU is published as parquet: {install('parquet')}") from None
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: no .parquet file is there; give MMMU's folder, or one subject's file")
    items: list[Item] = []
    for file in files:
        try:
            table = parquet.read_table(file).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a whole parquet file ({str(error)[:80]}); download it again") from None
        items += [_mmmu_item(row) for row in rows_of(file, table, ("id", "question", "options", "question_type"))]
    return items


def _mmmu_item(row: Row) -> Item:
    try:
        texts = ast.literal_eval(str(row.values["options"]))
    except (ValueError, SyntaxError):
        raise DataError(f"{row.where}: its options are not a list; download the file again") from None
    several = row.values["question_type"] == "multiple-choice"
    options = _lettered(row, texts) if several else {}
    question = row.text("question")
    prompt = with_options(question, options) + "\n" + LETTER if several else question + "\n" + SHORT
    pictures: list[bytes] = []
    for number in dict.fromkeys(re.findall(r"<image (\d+)>", prompt)):
        held = row.values.get(f"image_{number}")
        if not isinstance(held, dict) or not held.get("bytes"):
            raise DataError(f"{row.where}: <image {number}> has no picture image_{number}; download the file again")
        pictures.append(io.BytesIO(held["bytes"]).getvalue())
    subject = re.sub(r"^[^_]+_(.+?)_\d+$", r"\1", row.text("id"))
    return Item(
        id=row.text("id"),
        text=prompt,
        pictures=tuple(pictures),
        type=subject,
        row={"answer": row.values.get("answer") or "", "options": options},
    )


def score_mmmu(item: Item, answer: str) -> float:
    """Return MMMU's score of one answer: the letter, or a reference within what an open answer says."""
    wanted = str(item.row["answer"])
    if item.row["options"]:
        return float(mmmu_letter(answer, item.row["options"]) == wanted)
    references = _references(wanted)
    # lmms-eval keeps one of the readings as text: the first.
    return float(any(_within(one, reference) for one in mmmu_open(answer) for reference in references))


def _references(wanted: str) -> list[str | float]:
    texts = ast.literal_eval(wanted) if re.match(r"\[.*\]$", wanted) else [wanted]
    return [form for text in texts for form in mmmu_forms(str(text))]


def _within(said: str | float, reference: str | float) -> bool:
    if isinstance(said, str):
        return isinstance(reference, str) and reference in said
    return said == reference


def _mmmu_submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    said = {
        item.id: mmmu_letter(answer, item.row["options"]) if item.row["options"] else answer
        for item, answer in zip(items, answers, strict=True)
    }
    return json.dumps(said, ensure_ascii=False)


SCIENCEQA = Benchmark(
    about="ScienceQA-IMG: problems.json, with pid_splits.json next to it",
    read=read_scienceqa,
    judge=by_item(score_scienceqa),
    rule="the letter alone, case aside, or a capital and a full stop at the beginning",
)
SEED = Benchmark(
    about="SEED-Bench, its questions about pictures: SEED-Bench.json",
    read=read_seed,
    judge=by_item(lambda item, answer: float(answer.strip()[:1].lower() == item.row["answer"].lower())),
    rule="the first character of the answer, case aside",
    has_reference=lambda item: bool(item.row["answer"]),
    submission=("seed.jsonl", _seed_submission),
)
AI2D = Benchmark(
    about="AI2D: the folder ai2d with questions/, images/ and ai2d_test_ids.csv",
    read=read_ai2d,
    judge=by_item(score_ai2d),
    rule="the letter alone, case and punctuation aside, or a capital and a full stop at the beginning",
)
MMMU = Benchmark(
    about="MMMU val: its parquet files, one or the folder",
    read=read_mmmu,
    judge=by_item(score_mmmu),
    rule="(A), else A and a blank, else A., the last of several; a long answer may name an option; an answer without "
    "any is wrong (MMMU's own program draws a letter)",
    has_reference=lambda item: str(item.row["answer"]) not in ("", "?"),
    submission=("mmmu.json", _mmmu_submission),
)
