"""Do fast and exact training follow the same losses? Packed bf16 against padded transformers, FP8 and NF4 against bf16.

    python benchmarks/loss_parity.py --out results [--steps 300] [--batch 8] [--together] [--limit 400] [--tiny]

The inputs are those of train_speed.py, stage 2 (LoRA r = 512 on the LLM, r = 64 on the tower). All rows start from the
same adapters and take the same records in the same order with the same rates; each is a process of its own. Prints the
mean distance of the losses over the steps that both rows took, and writes all losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_inputs import make_inputs, recipe_of
from benchmarks.train_speed import Padded
from dianjing.run.journal import read_journal
from dianjing.run.layout import JOURNAL

ROWS: dict[str, str | None] = {"upstream": None, "bf16": "", "fp8": "fp8", "nf4": "nf4"}
"""What the product holds the frozen LLM as; None: padded transformers, bf16."""
PAIRS = (("bf16", "upstream", 0.01), ("fp8", "bf16", 0.02), ("nf4", "bf16", None))
"""Rows, the one they are held against, and the largest mean distance."""
STAGE = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/train_speed"))
    parser.add_argument("--only", default="", help="rows to run, by name, with commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--together", action="store_true", help="all rows at once: losses do not ask for the time")
    parser.add_argument("--limit", type=int, default=0, help="seconds after which a row is ended; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script itself")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        train_row(chosen)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    make_inputs(chosen.work, tiny=chosen.tiny)
    names = chosen.only.split(",") if chosen.only else [*ROWS]
    began = time.perf_counter()
    with ThreadPoolExecutor(len(names) if chosen.together else 1) as rows:
        found = rows.map(lambda name: run_row(name, chosen), names)
        curves = {name: losses for name, losses in zip(names, found, strict=True) if losses}
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)
    (chosen.out / "loss_parity.json").write_text(json.dumps(curves) + "\n", encoding="utf-8")
    return report(curves)


def run_row(name: str, chosen: argparse.Namespace) -> list[float]:
    """Run a row in a process of its own; return the losses of the steps it took."""
    run = run_of(name, chosen.work)
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
    ending = ""
    with (chosen.out / f"parity-{name}.log").open("w", encoding="utf-8") as log:
        try:
            if subprocess.run(command, stdout=log, stderr=log, timeout=chosen.limit or None).returncode:
                ending = f", then it failed: {log.name}"
        except subprocess.TimeoutExpired:  # the row's process is gone by now
            ending = f", then {chosen.limit} s were over"
    losses = [step["loss"] for step in read_journal(run)]
    print(f"{name}: {len(losses)} steps, loss {losses[:1]} -> {losses[-1:]}{ending}", flush=True)
    return losses


def run_of(name: str, work: Path) -> Path:
    return work / f"parity-{name}"


def report(curves: dict[str, list[float]]) -> int:
    """Print how far the curves are from each other; return 1 if a bound is not kept."""
    distances, failed = {}, False
    for name, beside, most in PAIRS:
        if name in curves and beside in curves:
            gaps = [abs(one - other) for one, other in zip(curves[name], curves[beside], strict=False)]
            distances[name] = sum(gaps) / len(gaps)
            failed |= most is not None and distances[name] > most
            bound = "" if most is None else f", at most {most}"
            mean = f"mean |difference| over {len(gaps)} steps {distances[name]:.5f}"
            print(f"{name} against {beside}: {mean}, worst {max(gaps):.5f}{bound}")
    if {"fp8", "nf4"} <= distances.keys():
        failed |= distances["fp8"] > distances["nf4"]
        print(f"FP8's distance is {distances['fp8'] / distances['nf4']:.2f} of NF4's")
    return int(failed)


def train_row(chosen: argparse.Namespace) -> None:
    """Train a row, which writes the loss of each step to its train.jsonl."""
    quantization = ROWS[chosen.row]
    settings: dict[str, Any] = {"max_steps": chosen.steps, "epochs": 1000, "global_batch_size": chosen.batch}
    recipe = recipe_of(chosen.work, STAGE, quantization=quantization or "", **settings, precision="bf16")
    recipe = replace(recipe, output=str(run_of(chosen.row, chosen.work)))
    if quantization is None:
        padded(recipe)
        return
    import dianjing.train.loop as loop

    loop._save = lambda *_: None  # 7 GB that nobody reads
    loop.train(recipe, quiet=True)


def padded(recipe: Any) -> None:
    """Train transformers' LLaVA on padded batches, in the product's order and with its rates."""
    from dianjing.data.order import run_indices
    from dianjing.train.optim import learning_rate_factor, set_learning_rates

    run, steps = Padded(recipe), recipe.train.max_steps
    plan = run_indices(
        run.dataset.num_records,
        seed=recipe.seed,
        mode=recipe.data.order,
        lengths=run.dataset.modality_lengths,
        global_batch_size=recipe.train.global_batch_size,
        rank=0,
        world_size=1,
        steps=range(0, steps),
    )
    folder = Path(recipe.output)
    folder.mkdir(parents=True)
    with (folder / JOURNAL).open("w", encoding="utf-8") as journal:
        for step, indices in enumerate(plan):
            set_learning_rates(run.optimizer, learning_rate_factor(step, steps, recipe.train.warmup_ratio))
            loss, _ = run.step(*run.batch(indices))
            print(json.dumps({"step": step + 1, "loss": loss.item()}), file=journal, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
