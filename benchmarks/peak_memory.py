"""What takes a GPU's memory at the peak of a run, by the line of the product that asked for it.

    python benchmarks/peak_memory.py [--row stage2-bf16] [--steps 4] [--shown 40] [--tiny]

Trains a row of train_speed.py while torch writes down what is allocated and freed, and prints what was there when most
was. What replays of a tower work in is nobody's tensor and stands in a line of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import dianjing.train.loop as loop
from benchmarks.train_inputs import make_inputs
from benchmarks.train_speed import OURS, new_run
from dianjing.layers.cuda_graphs import peak_bytes

GIB = 2**30
EVENTS = 4_000_000
"""Allocations and releases that torch is to remember."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("/tmp/train_speed"))
    parser.add_argument("--row", default="stage2-bf16", choices=OURS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shown", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script itself")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this needs a GPU")
    make_inputs(chosen.work, tiny=chosen.tiny)
    torch.cuda.memory._record_memory_history(max_entries=EVENTS, context="alloc", stacks="python")
    loop._save = lambda *_: None  # type: ignore[assignment]
    loop.train(new_run(chosen), quiet=True)
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    if len(trace) == EVENTS:
        sys.exit("torch has forgotten the beginning; give fewer --steps")
    sizes, numbers = at_peak(trace)
    tensors = sum(sizes.values())
    device = torch.device("cuda")
    replays = peak_bytes(device) - torch.cuda.max_memory_allocated(device)
    print(f"{tensors / GIB:.2f} GiB of tensors at the peak, {replays / GIB:.2f} more that replays work in")
    for place, size in sizes.most_common(chosen.shown):
        print(f"{size / GIB:8.3f} GiB {numbers[place]:6}  {place}")


def at_peak(trace: Sequence[dict[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes, and the number, of what was allocated when most was, by where it was asked for."""
    held = highest = peak = 0
    sizes: dict[int, int] = {}
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            held += event["size"]
        elif event["action"] == "free_requested":
            held -= sizes.pop(event["addr"], 0)
        if held > highest:
            highest, peak = held, number
    alive: dict[int, dict[str, Any]] = {}
    for event in trace[: peak + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_requested":
            alive.pop(event["addr"], None)
    bytes_of: Counter[str] = Counter()
    number_of: Counter[str] = Counter()
    for event in alive.values():
        place = place_of(event.get("frames", ()))
        bytes_of[place] += event["size"]
        number_of[place] += 1
    return bytes_of, number_of


def place_of(frames: Iterable[dict[str, Any]]) -> str:
    """Return the innermost line of the product, and the function that called it."""
    own = [frame for frame in frames if "/dianjing/" in frame["filename"]]
    if not own:
        return "(torch itself)"
    return " < ".join(f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in own[:2])


if __name__ == "__main__":
    main()
