"""The tiny world as benchmark files: POPE's JSON lines and MMBench's TSV, of scenes that no demo run is trained on.

    python benchmarks/tinyworld_benchmarks.py FOLDER [--scenes 60]
    dianjing eval demo-out/finetune FOLDER/pope --benchmark pope --images FOLDER/images
    dianjing eval demo-out/finetune FOLDER/mmbench_tinyworld.tsv --benchmark mmbench

POPE asks for an object that is there and for one that is not: any other ("random"), or one whose colour and shape are
both in the picture, of two different objects ("adversarial"). MMBench has four options a question, in one order; `eval`
asks all four orders (CircularEval).
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import random
from pathlib import Path

from dianjing.tinyworld.grammar import ENGLISH
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import COLOURS, SHAPES, Scene, allowed_pairs, sample_distinct

SEED = 7
"""Of `dianjing demo` too: its held-out scenes are drawn first, and are the ones used here."""
COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "category", "image")
SPLITS = ("random", "adversarial")
HELD_OUT = 360
NUMBERS = ["one", "two", "three", "four"]
Pair = tuple[str, str]


def absent(rng: random.Random, scene: Scene, split: str) -> Pair | None:
    """Return a colour and a shape that no object of the scene has together; None if the split has none."""
    there = {(thing.colour, thing.shape) for thing in scene}
    pairs = [pair for pair in allowed_pairs("train") if pair not in there]
    if split == "adversarial":
        colours, shapes = {colour for colour, _ in there}, {shape for _, shape in there}
        pairs = [pair for pair in pairs if pair[0] in colours and pair[1] in shapes]
    return rng.choice(pairs) if pairs else None


def pope_rows(rng: random.Random, scenes: list[Scene], split: str) -> list[dict[str, object]]:
    """Return POPE's lines: as many questions with "yes" as with "no"."""
    rows: list[dict[str, object]] = []
    for number, scene in enumerate(scenes):
        missing = absent(rng, scene, split)
        if missing is None:
            continue
        thing = rng.choice(scene)
        for (colour, shape), label in (((thing.colour, thing.shape), "yes"), (missing, "no")):
            text = f"Is there a {colour} {shape} in the image?"
            image = f"{number:05d}.png"
            rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})
    return rows


def choices(rng: random.Random, scene: Scene, category: str) -> tuple[str, str, list[str]] | None:
    """Return a question, its answer and all words it could be answered with; None if the scene does not allow it."""
    colours, shapes = [thing.colour for thing in scene], [thing.shape for thing in scene]
    thing = rng.choice(scene)
    if category == "colour" and shapes.count(thing.shape) == 1:
        return f"What colour is the {thing.shape}?", thing.colour, [*COLOURS]
    if category == "shape" and colours.count(thing.colour) == 1:
        return f"What shape is the {thing.colour} object?", thing.shape, [*SHAPES]
    if category == "where":
        return f"Where is the {thing.colour} {thing.shape}?", ENGLISH.places[thing.place], [*ENGLISH.places]
    if category == "count":
        return "How many objects are there?", NUMBERS[len(scene) - 1], NUMBERS
    return None


def choice_rows(rng: random.Random, scene: Scene) -> list[dict[str, str]]:
    """Return up to one question of each category, with four options in any order."""
    rows: list[dict[str, str]] = []
    for category in ("colour", "shape", "where", "count"):
        made = choices(rng, scene, category)
        if made is None:
            continue
        question, answer, words = made
        options = [answer, *rng.sample([word for word in words if word != answer], 3)]
        rng.shuffle(options)
        right = "ABCD"[options.index(answer)]
        rows.append(
            {"question": question, **dict(zip("ABCD", options, strict=True)), "answer": right, "category": category}
        )
    return rows


def mmbench_rows(rng: random.Random, scenes: list[Scene], images: Path) -> list[dict[str, object]]:
    """Return MMBench's rows, each with its picture in base64."""
    rows: list[dict[str, object]] = []
    for number, scene in enumerate(scenes):
        picture = base64.b64encode((images / f"{number:05d}.png").read_bytes()).decode()
        rows.extend({**row, "image": picture} for row in choice_rows(rng, scene))
    return [{"index": index, **row} for index, row in enumerate(rows)]


def write(folder: Path, number: int) -> None:
    """Write both benchmarks and their pictures."""
    rng = random.Random(SEED)
    scenes = sample_distinct(rng, number, "train")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        render(scene, rng.getrandbits(32)).save(images / f"{index:05d}.png", compress_level=1)
    (folder / "pope").mkdir(exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row) + "\n" for row in pope_rows(rng, scenes, split)]
        (folder / "pope" / f"coco_pope_{split}.json").write_text("".join(lines), encoding="utf-8")
    with (folder / "mmbench_tinyworld.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter="\t")
        table.writeheader()
        table.writerows(mmbench_rows(rng, scenes, images))


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=60)
    given = parser.parse_args()
    if not 1 <= given.scenes <= HELD_OUT:
        parser.error("--scenes: 1 to 360, the demo's held-out scenes")
    write(given.folder, given.scenes)
    print(f"written: {given.folder}/pope, {given.folder}/mmbench_tinyworld.tsv, {given.folder}/images")


if __name__ == "__main__":
    main()
