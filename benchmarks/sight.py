"""Sight from losses, where answers are sentences: a run that sees, one trained on shuffled pictures, the blind base.

    python benchmarks/sight.py [--out DIR] [--scenes N]

Scenes of the tiny world are drawn and told in sentences whose order is random, so that hardly an answer is exact. One
run is trained on them as they are, one with each record's picture exchanged for another's. Both, and the base, are
scored on 60 pictures that no training saw. It fails unless the first sees (the interval lies above 0) and the others
do not (0 lies within it).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from dianjing.config.load import load_recipe
from dianjing.data.record import load_records
from dianjing.eval.evaluate import Report, evaluate
from dianjing.infer.load import load_for_use
from dianjing.infer.questions import questions_of
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import sample_distinct
from dianjing.tinyworld.wording import describe
from dianjing.train.loop import train

HELD_OUT = 60
SEED = 11
MAX_NEW_TOKENS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder to work in; a temporary one if not given")
    parser.add_argument("--scenes", type=int, default=3000, help="scenes of the training (default %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sight-") as name:
        measure(given.out or Path(name), given.scenes)


def measure(folder: Path, number: int) -> None:
    """Train both runs in a folder, print the figures of all three models, and fail if they are not as expected."""
    held_out, training = write_data(folder, number)
    models = {"base": "tinyworld"}
    for name, records in training.items():
        began = time.monotonic()
        changes = {"output": str(folder / name), "data.path": str(records), "data.images": str(folder / "images")}
        train(load_recipe("tinyworld_pretrain", {**changes, "train.sample_every": 0}), resume=False, quiet=True)
        print(f"{name}: trained in {time.monotonic() - began:.0f} s", flush=True)
        models[name] = str(folder / name)
    reports = {name: scored(model, held_out, folder / "images") for name, model in models.items()}
    for name, report in reports.items():
        print(f"{name}: {json.dumps(report.overall.to_json())}")
    sights = {name: report.overall.figures["loss_sight"] for name, report in reports.items()}
    for name, sight in sights.items():
        print(f"{name:10} sight from losses {sight.mean:+.3f} [{sight.low:+.3f}, {sight.high:+.3f}]")
    if not sights["right"].low > 0:
        raise SystemExit("the run that was trained on its own pictures does not see")
    for name in ("base", "shuffled"):
        if not sights[name].low <= 0 <= sights[name].high:
            raise SystemExit(f"{name} seems to see")


def write_data(folder: Path, number: int) -> tuple[Path, dict[str, Path]]:
    """Draw the scenes; return the held-out records, and those of both trainings by name."""
    rng = random.Random(SEED)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for index, scene in enumerate(sample_distinct(rng, number + HELD_OUT, "train")):
        render(scene, rng.getrandbits(32)).save(folder / "images" / f"{index}.png", compress_level=1)
        asked = {"from": "human", "value": "<image>\nWhat do you see?"}
        answered = {"from": "gpt", "value": describe(rng, scene, "en", "sentences")}
        records.append({"id": str(index), "image": f"{index}.png", "conversations": [asked, answered]})
    held_out, seen = records[:HELD_OUT], records[HELD_OUT:]
    shuffled = [{**one, "image": other["image"]} for one, other in zip(seen, seen[1:] + seen[:1], strict=True)]
    return (
        written(folder / "held_out.json", held_out),
        {"right": written(folder / "right.json", seen), "shuffled": written(folder / "shuffled.json", shuffled)},
    )


def written(path: Path, records: list[dict]) -> Path:
    """Write records and return their file."""
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def scored(model: str, data: Path, images: Path) -> Report:
    """Return how a model answers the records of a file."""
    questions = [question for record in load_records(str(data)).records for question in questions_of(record)]
    return evaluate(load_for_use(model), questions, str(images), MAX_NEW_TOKENS)


if __name__ == "__main__":
    main()
