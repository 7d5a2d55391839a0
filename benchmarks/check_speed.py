"""How fast `dianjing check` is, on records and pictures made for it, and how much memory all its processes take.

python benchmarks/check_speed.py --records 665000 --pictures 2000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dianjing.check.check import Result, Settings, check
from dianjing.check.tokens import Measurer, Reading
from dianjing.config.schema import DataConfig
from dianjing.data.encode import load_tokenizer
from dianjing.data.picture_tokens import FixedCount
from dianjing.data.record import load_records
from dianjing.data.template import choose_template
from dianjing.model.folders import resolve

MIB = 2**20
SAMPLE_SECONDS = 0.05
SAID = (
    "the a of and in on with left right small large red green blue man woman dog street table window holding "
    "standing near behind several people image shows scene appears background sitting wearing looking together there"
)
TOKENIZED = 5_000
"""Records that are tokenised to measure its rate."""


def write_records(path: Path, number: int, seed: int = 0) -> None:
    """Write text-only conversations of one to five turns, as long as LLaVA's."""
    rng = random.Random(seed)

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(SAID.split(), k=rng.randint(shortest, longest)))

    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            turns = [(("human", text(5, 20)), ("gpt", text(5, 80))) for _ in range(rng.randint(1, 5))]
            said = [{"from": role, "value": value} for turn in turns for role, value in turn]
            file.write(("," if index else "[") + "\n" + json.dumps({"id": f"{index:09}", "conversations": said}))
        file.write("\n]\n")


def write_pictures(folder: Path, number: int) -> Path:
    """Write JPEG files of 640x480 with the grain of photos, and a record for each."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    grain = rng.integers(-12, 13, (480, 640, 3))
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        pixels = (np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06}.jpg", quality=85)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A scene."}]
    records = [{"id": f"{i}", "image": f"{i:06}.jpg", "conversations": said} for i in range(number)]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "data.json"


class Memory:
    """The largest resident size of this process and its children together, shared pages counted once."""

    def __enter__(self) -> Memory:
        self.peak = 0
        self._going = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going = False
        self._thread.join()

    def _watch(self) -> None:
        while self._going:
            self.peak = max(self.peak, sum(map(proportional_set, family(os.getpid()))))
            time.sleep(SAMPLE_SECONDS)


def family(process: int) -> list[int]:
    """Return a process and all that it started."""
    found = [process]
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [one for child in (task / "children").read_text().split() for one in family(int(child))]
    except OSError:
        pass  # it has ended
    return found


def proportional_set(process: int) -> int:
    """Return the bytes a process holds, a page shared by n processes counted as an nth."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def timed_check(settings: Settings) -> tuple[Result, float, float, int]:
    """Return the result, the seconds on the clock, those of all processors, and the largest memory."""
    with Memory() as memory:
        began, used = time.perf_counter(), sum(os.times()[:4])
        result = check(settings, lambda *_: None)
        seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - used
    return result, seconds, cpu, memory.peak


def tokenizing_rate(path: Path) -> float:
    """Return records a second of one process, with the tiny world's tokenizer."""
    folder = resolve("tinyworld", "language_model")
    data = DataConfig(path=str(path), max_tokens=10**6, pack_tokens=10**6)
    template = choose_template(load_tokenizer(folder))
    reading = Reading(tokenizer_folder=str(folder), template=template, picture_tokens=FixedCount(576), data=data)
    records, measurer = load_records(str(path)).records, Measurer(reading)
    began = time.process_time()
    measurer.measure(records)
    return len(records) / (time.process_time() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--pictures", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 = one a core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records.json", options.records)
        write_records(folder / "few.json", min(options.records, TOKENIZED))
        pictures = write_pictures(folder / "pictures", options.pictures)
        size = (folder / "records.json").stat().st_size
        cores = options.workers or len(os.sched_getaffinity(0))
        print(f"{options.records:,} records, {size / MIB:,.0f} MiB; {cores} processes", flush=True)
        for what, number, path in (
            ("records", options.records, folder / "records.json"),
            ("pictures", options.pictures, pictures),
        ):
            settings = Settings(paths=(str(path),), workers=options.workers)
            result, seconds, cpu, peak = timed_check(settings)
            assert result.findings.number("error") == 0, result.findings.counts
            print(
                f"{what:9} {number / seconds:9,.0f} a second  ({seconds:.1f} s on the clock, {cpu:.1f} s of all "
                f"processors), {peak / MIB:,.0f} MiB at most in all processes",
                flush=True,
            )
        print(f"tokenized {tokenizing_rate(folder / 'few.json'):9,.0f} records a second of one processor")


if __name__ == "__main__":
    main()
