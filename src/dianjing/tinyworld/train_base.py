"""Make the tiny world's base models from nothing: `python -m dianjing.tinyworld.train_base OUT` (needs one GPU).

The packaged ones were made by this command; their scores are in scores.json next to them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dianjing.tinyworld.base_language_model import CYCLES, train_language_model, train_tokenizer
from dianjing.tinyworld.base_vision_tower import train_vision_tower

GATE = 0.98
"""Share of text questions the language model must answer; a blind model that cannot read cannot be taught to see."""


def main() -> None:
    """Train tokenizer, language model and vision tower, and write their scores next to them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=("both", "language_model", "vision_tower"), default="both")
    parser.add_argument("--cycle", type=int, choices=(1, 2, 3), help="only this cycle of the language model")
    parser.add_argument("--dialogues", type=int, default=1_600_000)
    parser.add_argument("--vision-tower-steps", type=int, default=10_000)
    parser.add_argument("--pictures", type=int, default=256_000)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as workers:
        if options.part != "language_model":
            began = time.monotonic()
            scores = train_vision_tower(
                options.out / "vision_tower",
                workers,
                steps=options.vision_tower_steps,
                pictures=options.pictures,
            )
            _write_scores(options.out / "vision_tower", scores, began)
        if options.part != "vision_tower":
            folder = options.out / "language_model"
            for number, cycle in enumerate(CYCLES, start=1):
                if options.cycle in (None, number):
                    began = time.monotonic()
                    if number == 1:
                        train_tokenizer(folder, seed=0)
                    scores = train_language_model(folder, workers, cycle=cycle, dialogues=options.dialogues)
                    _write_scores(folder, scores, began)
            _require_gate(folder)


def _require_gate(folder: Path) -> None:
    share = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["scores"]["all"]
    if share < GATE:
        raise SystemExit(f"gate: {share:.3f} of the text questions are answered, not {GATE}")


def _write_scores(folder: Path, scores: dict[str, float], began: float) -> None:
    result = {"scores": scores, "seconds": round(time.monotonic() - began)}
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(folder.name, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
