"""RefCOCO, as XTuner's eval_refcoco has it: the model writes the box of what a phrase refers to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dianjing.benchmark.item import Benchmark, Item, Judged, Unit, mean
from dianjing.benchmark.rows import read_json, rows_of
from dianjing.errors import DataError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
SCALE = 100
"""XTuner's boxes are whole percents of the picture's width and height."""
ENOUGH = 0.5
"""From more than this IoU on, a box is right."""


def read_refcoco(file: Path) -> list[Item]:
    """Return the questions of XTuner's JSON: image or img_id, sents, bbox (x, y, width, height), height, width."""
    items: list[Item] = []
    for row in rows_of(file, read_json(file), ("sents", "bbox", "height", "width")):
        box, width, height = row.values["bbox"], row.values["width"], row.values["height"]
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise DataError(f'{row.where}: "bbox" is {box!r}, not [x, y, width, height] in pixels; mend the row')
        if not all(isinstance(side, int | float) and side > 0 for side in (width, height)):
            raise DataError(f'{row.where}: "width" and "height" must be the picture\'s, in pixels; mend the row')
        image = row.values.get("image")
        if not image:
            image = row.text("img_id").split("_")[-2:][0].removesuffix(".jpg") + ".jpg"
        phrase = row.text("sents")
        items.append(
            Item(
                id=f"{image}/{phrase}/{len(items)}",
                text=f"[refer] give me the location of {phrase}",
                pictures=(str(image),),
                type="question",
                row={"box": box, "width": width, "height": height},
            )
        )
    return items


def percent_box(item: Item) -> Box:
    """Return the reference in whole percents, rounded down."""
    (x, y, w, h), width, height = item.row["box"], item.row["width"], item.row["height"]
    sides = (x / width, y / height, (x + w) / width, (y + h) / height)
    left, top, right, bottom = (int(side * SCALE) for side in sides)
    return left, top, right, bottom


def said_box(answer: str) -> Box | None:
    """Return the box of an answer with exactly four whole numbers in it."""
    numbers = [int(number) for number in re.findall(r"\d+", answer)]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def iou(one: Box, other: Box, edge: float = 0) -> float:
    """Return the overlap of two boxes divided by their union; `edge` is what the last row and column add (COCO: 1)."""
    sides = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i]) + edge) for i in (0, 1)]
    areas = [max(0.0, box[2] - box[0] + edge) * max(0.0, box[3] - box[1] + edge) for box in (one, other)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def judge(items: Sequence[Item], answers: Sequence[str]) -> Judged:
    """Return XTuner's accuracy (its IoU, in percents, above 0.5), and the mean of that IoU."""
    overlaps: list[float] = []
    for item, answer in zip(items, answers, strict=True):
        box = said_box(answer)
        overlaps.append(iou(box, percent_box(item), edge=1) if box else 0.0)
    units = [Unit(item.type, float(one > ENOUGH)) for item, one in zip(items, overlaps, strict=True)]
    return Judged(units, {"accuracy": mean([unit.value for unit in units]), "mean IoU": mean(overlaps)})


REFCOCO = Benchmark(
    about="RefCOCO, RefCOCO+, RefCOCOg: the JSON of XTuner's eval_refcoco",
    read=read_refcoco,
    judge=judge,
    rule="the answer has exactly four whole numbers, percents of width and height; right above an IoU of 0.5",
    max_new_tokens=100,
)
