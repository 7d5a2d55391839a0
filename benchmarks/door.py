"""How long the first commands of a day take: help, a look at ten records, and errors that need no model.

    python benchmarks/door.py [--runs 5] [--before SRC]

Each figure is the median of processes of their own, on ten drawn pictures and the packaged tiny world. With --before,
the `src` folder of another commit is measured in turn with this one, so that both meet the same load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

SOURCE = Path(__file__).parents[1] / "src"
RECORDS = 10


def write_files(folder: Path) -> None:
    """Write ten records with pictures, and a folder that holds a run."""
    records = []
    for index in range(RECORDS):
        Image.new("RGB", (64, 48), (20 * index, 90, 120)).save(folder / f"{index}.png")
        said = [
            {"from": "human", "value": f"<image>\nWhich picture is number {index}?"},
            {"from": "gpt", "value": "This one."},
        ]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": said})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "held" / "checkpoints" / "step-000001").mkdir(parents=True)


def commands() -> Mapping[str, Sequence[str]]:
    """Return the command lines by what they are; all begin in the folder of `write_files`."""
    train = ["train", "tinyworld_pretrain", "--data.path", "data.json", "--data.images", ""]
    return {
        "--help": ["--help"],
        "show --help": ["show", "--help"],
        "train --help": ["train", "--help"],
        "check, 10 records": ["check", "data.json"],
        "check --llm, 10 records": ["check", "data.json", "--llm", "tinyworld"],
        "show, 10 records": ["show", "data.json", "--llm", "tinyworld"],
        "train: the folder holds a run": [*train, "--output", "held"],
        "train: no such LLM folder": [*train, "--output", "new", "--language-model.folder", "./nowhere"],
        "train: no such data": [*train, "--output", "new", "--data.path", "nowhere.json"],
        "plan: no such tower folder": ["plan", "tinyworld_pretrain", "--vision-tower.folder", "./nowhere"],
    }


def seconds(command: Sequence[str], source: Path, folder: Path) -> float:
    """Return how long one process takes."""
    environment = {**os.environ, "PYTHONPATH": str(source), "XDG_CACHE_HOME": str(folder / "cache")}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dianjing", *command], cwd=folder, env=environment, capture_output=True, check=False
    )
    return time.perf_counter() - began


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--before", type=Path)
    given = parser.parse_args()
    sources = {"before": given.before.resolve(), "now": SOURCE} if given.before else {"now": SOURCE}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        print(f"{'command':32}" + "".join(f"{column:>10}" for column in sources))
        for what, command in commands().items():
            found: dict[str, list[float]] = {column: [] for column in sources}
            for _ in range(given.runs + 1):
                for column, source in sources.items():
                    found[column].append(seconds(command, source, folder))
            # The first of each fills caches.
            print(f"{what:32}" + "".join(f"{statistics.median(times[1:]):8.2f} s" for times in found.values()))


if __name__ == "__main__":
    main()
