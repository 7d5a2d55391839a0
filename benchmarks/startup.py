"""How long a run on 665,000 records takes to start, the first time and the next, and how much memory that needs.

    python benchmarks/startup.py [--records 665000] [--pictures 150] [--llm FOLDER] [--folder DIR] [--no-hf]

The records are made: texts as long as those of LLaVA-1.5's mix (293 tokens in the mean, 197 in the median, 834 at the
95th percentile), 94 % with a picture of 640x480. Each figure is of a process of its own. Beside them stands what it
takes Hugging Face datasets to read the same file and to tokenise the same texts, two processes at work (`pip install
datasets`); it makes no labels and looks at no picture.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.check_speed import MIB, SAID, Memory, write_pictures

MEDIAN_TOKENS, SPREAD = 197, 0.89
"""Of a lognormal distribution, whose mean is then 293 and whose 95th percentile 852."""
SHORTEST, LONGEST = 12, 4000
TOKENS_OF_A_TURN = 12
"""What the template and the marks take."""
WITH_PICTURE = 0.94
MOST_TURNS = 12
QUESTION_WORDS = (4, 12)
BATCH = 16
HF_PROCESSES = 2
GOAL_SECONDS, GOAL_MIB = 10, 1024


def write_records(path: Path, number: int, pictures: int, seed: int = 0) -> None:
    """Write a JSON list of conversations; each shows one of the pictures, or none."""
    rng = random.Random(seed)
    words = SAID.split()

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            tokens = min(max(int(rng.lognormvariate(0, SPREAD) * MEDIAN_TOKENS), SHORTEST), LONGEST)
            turns = min(rng.randint(1, MOST_TURNS), max(tokens // (2 * TOKENS_OF_A_TURN), 1))
            record: dict[str, Any] = {"id": f"{index:09}"}
            seeing = rng.random() < WITH_PICTURE
            if seeing:
                record["image"] = f"{rng.randrange(pictures):06}.jpg"
            said = []
            for turn in range(turns):
                asked = rng.randint(*QUESTION_WORDS)
                answered = max(tokens // turns - TOKENS_OF_A_TURN - asked, 1)
                mark = "<image>\n" if seeing and not turn else ""
                said += [{"from": "human", "value": mark + text(asked)}, {"from": "gpt", "value": text(answered)}]
            file.write(("," if index else "[") + "\n" + json.dumps({**record, "conversations": said}))
        file.write("\n]\n")


def parts_of(folder: Path, llm: str) -> tuple[Any, Any, Any]:
    """Return data config, encoder and image processor of a run on the records."""
    from dianjing.config.schema import DataConfig
    from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
    from dianjing.data.picture_tokens import FixedCount
    from dianjing.data.template import template_for
    from dianjing.model.folders import resolve
    from dianjing.pictures.image import ImageProcessor

    tokenizer = load_tokenizer(resolve(llm, "language_model", weights=False))
    config = DataConfig(path=str(folder / "records.json"), images=str(folder / "pictures"), on_long_record="truncate")
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template_for(tokenizer)[0],
        picture_tokens=FixedCount(576),
        max_tokens=config.max_tokens,
        on_long_record=config.on_long_record,
        image_token_id=image_token_id(tokenizer),
    )
    return config, encoder, ImageProcessor.from_folder(resolve("tinyworld", "vision_tower", weights=False))


def measure_start(folder: Path, llm: str) -> dict[str, Any]:
    """Open the records as a run does, and make the first batch."""
    began = time.perf_counter()
    with Memory() as memory:
        from dianjing.data.dataset import open_dataset, step_batches
        from dianjing.data.order import run_indices

        config, encoder, image_processor = parts_of(folder, llm)
        loaded, used = time.perf_counter(), sum(os.times()[:4])
        dataset = open_dataset(config, encoder, image_processor)
        opened, open_cpu = time.perf_counter(), sum(os.times()[:4]) - used
        plan = run_indices(
            dataset.num_records,
            seed=0,
            mode=config.order,
            lengths=dataset.modality_lengths,
            global_batch_size=BATCH,
            rank=0,
            world_size=1,
            steps=range(0, 1),
        )
        first = next(step_batches(dataset, plan, workers=0))
        batched = time.perf_counter()
    assert sum(len(batch.ids) for batch in first) == BATCH
    lengths = sorted(abs(length) for length in dataset.modality_lengths)
    return {
        "load": loaded - began,
        "open": opened - loaded,
        "open_cpu": open_cpu,
        "first_batch": batched - opened,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "all": memory.peak / MIB,
        "records": dataset.num_records,
        "opened": dataset.opened,
        "fingerprint": dataset.fingerprint,
        "tokens": [sum(lengths) / len(lengths), *(lengths[int(len(lengths) * share)] for share in (0.5, 0.95))],
    }


def measure_hf(folder: Path, llm: str) -> dict[str, Any]:
    """Read and tokenise the records with datasets: one call of the tokenizer a batch, nothing is made of the ids."""
    try:
        import datasets
    except ImportError:
        raise SystemExit("the row of Hugging Face datasets needs `pip install datasets` (or give --no-hf)") from None
    from dianjing.data.record import Turn
    from dianjing.data.template import spans

    datasets.disable_progress_bars()
    _, encoder, _ = parts_of(folder, llm)
    tokenizer, template = encoder.tokenizer, encoder.template

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = []
        for said in batch["conversations"]:
            pairs = zip(said[::2], said[1::2], strict=True)
            turns = [Turn(question=asked["value"], answer=answer["value"]) for asked, answer in pairs]
            texts.append("".join(span.text for span in spans(template, turns)))
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    began, used = time.perf_counter(), sum(os.times()[:4])
    with Memory() as memory:
        cache = str(folder / "hf_cache")
        records = datasets.load_dataset("json", data_files=str(folder / "records.json"), cache_dir=cache)["train"]
        read = time.perf_counter()
        records.map(tokenise, batched=True, num_proc=HF_PROCESSES, remove_columns=records.column_names)
    ended = time.perf_counter()
    return {
        "open": ended - began,
        "read": read - began,
        "open_cpu": sum(os.times()[:4]) - used,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "all": memory.peak / MIB,
        "records": len(records),
    }


def in_a_process(what: str, folder: Path, llm: str) -> dict[str, Any]:
    """Measure in a process that has nothing in memory yet."""
    command = [sys.executable, __file__, "--measure", what, "--folder", str(folder), "--llm", llm]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def show(name: str, row: dict[str, Any]) -> None:
    """Print a row."""
    batch = f", first batch {row['first_batch']:.1f} s after" if "first_batch" in row else ""
    print(
        f"{name:12} {row['open']:7.1f} s on the clock, {row['open_cpu']:7.1f} s of all processors; peak "
        f"{row['rss']:,.0f} MiB in the main process, {row['all']:,.0f} in all{batch}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--pictures", type=int, default=150, help="picture files, used again and again")
    parser.add_argument("--llm", default="tinyworld", help="folder whose tokenizer is used")
    parser.add_argument("--folder", default="", help="where records are made and kept; a temporary one if not given")
    parser.add_argument("--no-hf", action="store_true", help="leave out Hugging Face datasets")
    parser.add_argument("--measure", choices=("start", "hf"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure = measure_start if options.measure == "start" else measure_hf
        print(json.dumps(measure(Path(options.folder), options.llm)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "pictures").is_dir():
            write_pictures(folder / "pictures", options.pictures)
            write_records(folder / "records.json", options.records, options.pictures)
        for cached in (folder / "cache", folder / "hf_cache"):
            shutil.rmtree(cached, ignore_errors=True)
        size = (folder / "records.json").stat().st_size / MIB
        print(f"{size:,.0f} MiB of JSON, {len(os.sched_getaffinity(0))} cores, tokenizer {options.llm}", flush=True)
        cold, warm = (in_a_process("start", folder, options.llm) for _ in range(2))
        assert [bool(row["opened"]) for row in (cold, warm)] == [False, True], "the cache was not made and used"
        assert cold["fingerprint"] == warm["fingerprint"]
        mean, median, high = cold["tokens"]
        print(f"{cold['records']:,} records: {mean:.0f} tokens in the mean, {median} in the median, {high} at 95 %")
        show("first start", cold)
        show("next start", warm)
        print(f"{'':12} (programs and tokenizer: {cold['load']:.1f} and {warm['load']:.1f} s before)")
        reached = warm["open"] < GOAL_SECONDS and warm["rss"] < GOAL_MIB
        print(f"goal of the next start, {GOAL_SECONDS} s and {GOAL_MIB:,} MiB: {'reached' if reached else 'MISSED'}")
        if options.no_hf:
            return
        theirs = in_a_process("hf", folder, options.llm)
        show("HF datasets", theirs)
        print(f"{'':12} ({theirs['read']:.1f} s of it to read the JSON)")
        for name, row in (("first", cold), ("next", warm)):
            clock, cpu = row["open"] / theirs["open"], row["open_cpu"] / theirs["open_cpu"]
            print(f"{name} start / HF datasets: {clock:.3f} on the clock, {cpu:.3f} of all processors")


if __name__ == "__main__":
    main()
