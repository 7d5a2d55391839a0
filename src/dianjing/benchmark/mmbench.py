"""MMBench in English and Chinese (CCBench too) or a multiple-choice file of one's own -> items; answers -> accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dianjing.benchmark.choice_letter import mmbench_letter
from dianjing.benchmark.item import LETTER, LETTER_CN, LETTERS, Benchmark, Item, Judged, Unit, mean, with_options
from dianjing.benchmark.rows import Row, files_in, picture_bytes, read_json, read_lines, read_table, rows_of
from dianjing.errors import DataError

TURNED = 1_000_000
"""MMBench: an index above this is the question index % TURNED again, its options in another order."""
SHORTEST_PICTURE = 16
"""MMBench: a shorter text in the column of pictures is the index of the row that has the picture."""
OWN_COLUMNS = ("question", "A", "B", "image")


def read_mmbench(file: Path) -> list[Item]:
    """Return the questions of an MMBench TSV, each with the turned copies of CircularEval.

    A file that has no copies gets them: each question is asked with its options moved on by one until each option
    has stood under each letter.
    """
    rows = read_table(file, ("index", "question", "A", "B", "image"))
    by_index = {row.text("index"): row for row in rows}
    items = [_item(row, by_index) for row in rows]
    if not any(int(item.id) >= TURNED for item in items):
        items = [copy for item in items for copy in _turned(item)]
    return items


def read_own(file: Path) -> list[Item]:
    """Return the questions of a TSV, CSV, JSON or JSONL file with the columns question, A, B, ..., answer, image."""
    readers = {".tsv": lambda: read_table(file, OWN_COLUMNS), ".csv": lambda: read_table(file, OWN_COLUMNS, ",")}
    readers[".jsonl"] = lambda: read_lines(file, OWN_COLUMNS)
    readers[".json"] = lambda: rows_of(file, read_json(file), OWN_COLUMNS)
    (file,) = files_in(file, "")
    if file.suffix.lower() not in readers:
        raise DataError(f"{file}: a file of one's own ends with {', '.join(readers)}")
    return [_own(number, row) for number, row in enumerate(readers[file.suffix.lower()](), 1)]


def _own(number: int, row: Row) -> Item:
    options = row.options([letter for letter in LETTERS if letter in row.values])
    row.letter("answer", options)
    image = row.text("image")
    inside = not re.search(r"\.\w{2,5}$", image)
    return Item(
        id=str(row.values.get("index") or number),
        text=_prompt(row.text("question"), "", options),
        pictures=(picture_bytes(row, image) if inside else image,),
        type=str(row.values.get("category") or "question"),
        row={**row.values, "options": options},
    )


def _item(row: Row, by_index: Mapping[str, Row]) -> Item:
    index, options = row.text("index"), row.options("ABCDE")
    if not index.isdigit():
        raise DataError(f'{row.where}: "index" is {index!r}, a whole number is needed; download the file again')
    hint = str(row.values.get("hint") or "").strip()
    first = by_index.get(str(int(index) % TURNED), row)
    row.letter("answer", options)
    return Item(
        id=index,
        text=_prompt(row.text("question"), "" if hint == "nan" else hint, options),
        pictures=(_picture(row, by_index),),
        type=str(first.values.get("category") or "question"),
        group=str(int(index) % TURNED),
        row={**row.values, "options": options, "hint": "" if hint == "nan" else hint},
    )


def _picture(row: Row, by_index: Mapping[str, Row]) -> bytes:
    holder = row
    while len(image := holder.text("image")) < SHORTEST_PICTURE:
        if image not in by_index or by_index[image] is holder or image == row.values["index"]:
            raise DataError(f"{row.where}: its picture is that of index {image}, which has none; download it again")
        holder = by_index[image]
    return picture_bytes(holder, image)


def _prompt(question: str, hint: str, options: Mapping[str, str]) -> str:
    """Return the prompt of LLaVA 1.5, which XTuner's MMBench asks too."""
    text = with_options(f"{hint}\n{question}" if hint else question, options)
    return text + (LETTER_CN if re.search("[\u4e00-\u9fff]", text) else LETTER)


def _turned(item: Item) -> list[Item]:
    """Return an item with all its options in all places; the answer keeps its text."""
    options: Mapping[str, str] = item.row["options"]
    texts, answer = [*options.values()], str(item.row.get("answer") or "")
    found: list[Item] = []
    for by in range(len(texts)):
        moved = dict(zip(options, texts[by:] + texts[:by], strict=True))
        right = LETTERS[(LETTERS.index(answer) - by) % len(texts)] if answer in options else ""
        number = str(int(item.id) + by * TURNED)
        row = {**item.row, **moved, "options": moved, "answer": right, "index": number}
        text = _prompt(str(row["question"]), str(row["hint"]), moved)
        found.append(replace(item, id=number, text=text, row=row))
    return found


def chosen(item: Item, answer: str) -> str:
    """Return the letter that an answer chooses."""
    return mmbench_letter(answer, item.row["options"])


def judge_circular(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return CircularEval's accuracy (all copies of a question are right), and that of the first copies alone."""
    right: dict[int, list[bool]] = {}
    first: dict[int, bool] = {}
    types: dict[int, str] = {}
    for item, answer in zip(items, answers, strict=True):
        index, hit = int(item.id) % TURNED, chosen(item, answer) == item.row["answer"]
        right.setdefault(index, []).append(hit)
        types.setdefault(index, item.type)
        if int(item.id) < TURNED:
            first[index] = hit
    units = [Unit(types[index], float(all(right[index]))) for index in first]
    figures = {"accuracy": mean([unit.value for unit in units]), "plain": mean([float(hit) for hit in first.values()])}
    return Judged(units, figures)


def judge_own(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return the accuracy, each question once."""
    hits = [chosen(item, answer) == item.row["answer"] for item, answer in zip(items, answers, strict=True)]
    units = [Unit(item.type, float(hit)) for item, hit in zip(items, hits, strict=True)]
    return Judged(units, {"accuracy": mean([unit.value for unit in units])})


def submission(items: Sequence[Item], answers: Sequence[str]) -> str:
    """Return the table that MMBench's server takes: index, question, options, prediction."""
    lines = ["\t".join(("index", "question", *"ABCD", "prediction"))]
    for item, answer in zip(items, answers, strict=True):
        cells = [item.id, item.row["question"], *(item.row["options"].get(letter, "") for letter in "ABCD"), answer]
        lines.append("\t".join(re.sub(r"\s+", " ", str(cell)) for cell in cells))
    return "\n".join(lines) + "\n"


RULE = (
    "a letter alone or in (A), A. and the like; else the one option whose text stands in the answer, case aside; else "
    "the letter in the most certain place; no other model is asked"
)
MMBENCH = Benchmark(
    about="MMBench (EN, CN) and CCBench: the TSV with pictures in base64",
    read=read_mmbench,
    judge=judge_circular,
    rule=RULE,
    has_reference=lambda item: bool(item.row["answer"]),
    submission=("mmbench.tsv", submission),
)
OWN = Benchmark(
    about="your own: TSV, CSV, JSON or JSONL with question, A, B, ..., answer, image (a name or base64), category",
    read=read_own,
    judge=judge_own,
    rule=RULE,
    has_reference=lambda item: bool(item.row.get("answer")),
)
