"""POPE and MME: questions that are answered with yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dianjing.benchmark.item import SHORT, Benchmark, Item, Judged, Unit, mean
from dianjing.benchmark.rows import Row, files_in, read_lines
from dianjing.errors import DataError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_END = " Please answer yes or no."
"""The end of MME's own questions; LLaVA 1.5 asks with its own end instead."""


def read_pope(file: Path) -> list[Item]:
    """Return the questions of coco_pope_random.json and its two sisters: one file, or the folder with all three."""
    items: list[Item] = []
    for one in files_in(file, ".json"):
        split = one.stem.rpartition("_")[2]
        for number, row in enumerate(read_lines(one, ("image", "text")), 1):
            _yes_or_no(row, "label")
            items.append(
                Item(
                    id=f"{split}/{row.values.get('question_id', number)}",
                    text=row.text("text") + SHORT,
                    pictures=(row.text("image"),),
                    type=split,
                    row={"answer": row.values.get("label", "")},
                )
            )
    return items


def _yes_or_no(row: Row, name: str) -> None:
    if row.values.get(name) not in ("yes", "no"):
        raise DataError(f'{row.where}: "{name}" is {row.values.get(name)!r}, yes or no is needed; mend the row')


def judge_pope(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return POPE's figures; an answer that is neither yes nor no is wrong and counts as neither."""
    said = [answer.lower().strip() for answer in answers]
    wanted = [str(item.row["answer"]) for item in items]
    pairs = [*zip(said, wanted, strict=True)]
    units = [Unit(item.type, float(a == b)) for item, (a, b) in zip(items, pairs, strict=True)]
    hits, false = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    missed = pairs.count(("no", "yes"))
    precision, recall = (hits / (hits + wrong) if hits + wrong else 0.0 for wrong in (false, missed))
    f1 = 2 * (precision * recall) / (precision + recall) if precision + recall else 0.0
    figures = {"accuracy": mean([unit.value for unit in units]), "precision": precision, "recall": recall, "f1": f1}
    return Judged(units, figures | {"says yes": mean([float(answer == "yes") for answer in said])})


def read_mme(folder: Path) -> list[Item]:
    """Return the questions of MME_Benchmark_release_version: a folder a category, a .txt file a picture."""
    items: list[Item] = []
    files = sorted(file for file in folder.glob("*/**/*.txt") if not file.name.startswith("."))
    if not files:
        raise DataError(f"{folder}: no CATEGORY/*.txt is there; give the folder MME_Benchmark_release_version")
    for file in files:
        category, picture = file.relative_to(folder).parts[0], _mme_picture(folder, file)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            question, tab, answer = line.rpartition("\t")
            answer = answer.strip().lower().replace(".", "")
            if not tab or answer not in ("yes", "no"):
                raise DataError(f"{file}: row {number} is not QUESTION, a tab, Yes or No; download the file again")
            items.append(
                Item(
                    id=f"{category}/{file.stem}/{number}",
                    text=question.strip().replace(MME_END, "") + SHORT,
                    pictures=(picture,),
                    type=category,
                    group=f"{category}/{file.stem}",
                    row={"answer": answer, "picture": f"{category}/{file.stem}"},
                )
            )
    return items


def _mme_picture(folder: Path, file: Path) -> str:
    places = (file.parent, folder / file.relative_to(folder).parts[0] / "images")
    for place in places:
        for ending in (".jpg", ".png", ".jpeg"):
            if (place / (file.stem + ending)).is_file():
                return (place / (file.stem + ending)).relative_to(folder).as_posix()
    raise DataError(f"{file}: its picture {file.stem}.jpg or .png is not there; put it next to it or into images/")


def mme_answer(answer: str) -> str:
    """Return yes, no or other: the whole answer, its letter y or n, or the first four characters."""
    answer = answer.lower().strip().replace(".", "")
    if answer in ("y", "n"):
        return {"y": "yes", "n": "no"}[answer]
    return next((word for word in ("yes", "no") if len(answer) > 1 and word in answer[:4]), "other")


def judge_mme(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return MME's scores: for each category the accuracy plus the share of pictures with both right, in percent."""
    pairs: dict[str, dict[str, list[float]]] = {}
    units: list[Unit] = []
    for item, answer in zip(items, answers, strict=True):
        hit = float(mme_answer(answer) == item.row["answer"])
        units.append(Unit(item.type, hit))
        pairs.setdefault(item.type, {}).setdefault(item.row["picture"], []).append(hit)
    for category, pictures in pairs.items():
        if odd := [name for name, hits in pictures.items() if len(hits) != 2]:
            raise DataError(f"MME asks two questions a picture, but {odd[0]} ({category}) has another number; mend it")
    scores = {
        category: mean([sum(hits) / 2 * 100 + (sum(hits) == 2) * 100.0 for hits in pictures.values()])
        for category, pictures in pairs.items()
    }
    seen = [score for name, score in scores.items() if name in PERCEPTION]
    thought = [score for name, score in scores.items() if name not in PERCEPTION]
    figures = {"accuracy": mean([unit.value for unit in units])}
    return Judged(units, figures | {"perception": float(sum(seen)), "cognition": float(sum(thought))})


POPE = Benchmark(
    about="POPE: coco_pope_random.json, _popular, _adversarial, or the folder with them",
    read=read_pope,
    judge=judge_pope,
    rule="the whole answer is yes or no, case aside; anything else is wrong",
)
MME = Benchmark(
    about="MME: the folder MME_Benchmark_release_version",
    read=read_mme,
    judge=judge_mme,
    rule="yes or no, y or n, or one of them within the first four characters; full stops do not count",
)
