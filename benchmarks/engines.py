"""The engines side by side: losses, seconds and peak memory of the same finetune.

    python benchmarks/engines.py [--steps 20] [--precision bf16] [--gpus 2]

Draws its own data, finetunes the tiny world (LoRA on LLM and tower) with each engine under torchrun, by default
as one rank, where FSDP2 and DeepSpeed wrap the model all the same, and says whether the losses are equal; with several
GPUs, to those of one with ddp too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cpu_step import write_records
from benchmarks.train_speed import TOLD, torchrun

ENGINES = ("ddp", "fsdp2", "deepspeed_zero2")
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of losses that rounding explains; in bf16 it grows over the steps."""
CHILD = """
import sys, torch
from dianjing.config.load import load_recipe
from dianjing.train.loop import train
train(load_recipe(sys.argv[1]), quiet=True)
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print("peak", peak)
torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
"""


def write_recipe(folder: Path, engine: str, data: Path, options: argparse.Namespace) -> Path:
    """Write the tiny world's finetune for one engine into a folder of its own and return the file."""
    from dianjing.config.load import load_recipe, save_recipe

    overrides = {
        "output": str(folder / engine),
        "data.path": str(data),
        "data.images": str(data.parent),
        "projector.init_from": "",
        "vision_tower.tuning": "lora",
        "train.engine": engine,
        "train.max_steps": options.steps,
        "train.epochs": 9,
        "train.log_every": 1,
        "train.sample_every": 0,
        "train.precision": options.precision,
        "train.compile": "off",  # joined layers round otherwise, and only some engines have them
    }
    folder.mkdir()
    path = folder / f"{engine}.toml"
    save_recipe(load_recipe("tinyworld_finetune", overrides), path)
    return path


def run(recipe: Path, gpus: int) -> tuple[list[float], float, float]:
    """Train one engine, a rank on each GPU; return losses, the largest peak of a GPU in MiB and the seconds in all."""
    child = recipe.with_name("child.py")
    child.write_text(CHILD, encoding="utf-8")
    began = time.perf_counter()
    command = [sys.executable, *torchrun(gpus), str(child), str(recipe)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe.stem} failed:\n{done.stderr[-TOLD:]}")
    lines = (recipe.with_suffix("") / "train.jsonl").read_text(encoding="utf-8").splitlines()
    peak = max(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    return [json.loads(line)["loss"] for line in lines], peak / 2**20, time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="bf16")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU")
    options = parser.parse_args()
    rows = {engine: (engine, options.gpus) for engine in ENGINES}
    if options.gpus > 1:
        rows = {"one GPU": ("ddp", 1), **rows}
    results = {}
    with tempfile.TemporaryDirectory() as name:
        data = write_records(Path(name))
        for row, (engine, gpus) in rows.items():
            results[row] = run(write_recipe(Path(name) / row.replace(" ", "_"), engine, data, options), gpus)
            print(f"{row:16} {results[row][2]:6.1f} s in all, peak {results[row][1]:8.1f} MiB", flush=True)
    print("step  " + "".join(f"{row:>17}" for row in rows))
    for step, losses in enumerate(zip(*(losses for losses, _, _ in results.values()), strict=True), start=1):
        print(f"{step:4}  " + "".join(f"{loss:17.6f}" for loss in losses))
    first, (expected, _, _) = next(iter(results.items()))
    unequal = False
    for row, (losses, _, _) in results.items():
        gap = max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))
        verdict = "equal" if gap <= TOLERANCE[options.precision] else "UNEQUAL"
        unequal |= verdict != "equal"
        print(f"{row:16} {verdict}: largest relative difference from {first} {gap:.1e}")
    sys.exit(unequal)


if __name__ == "__main__":
    main()
