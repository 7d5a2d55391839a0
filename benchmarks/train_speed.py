"""Samples a second on one GPU at the shapes of InternLM2-Chat-1.8B + CLIP ViT-L/14-336, beside padded transformers.

    python benchmarks/train_speed.py --out results [--only stage1-bf16,stage2-fp8] [--steps 30] [--gpus 2] [--tiny]

Inputs are made first: random weights at the true shapes, JPEG pictures of 640x480, LLaVA JSON of the lengths below.
"ours" rows run the product's own `train`, real loader included, and read its train.jsonl. "upstream" rows run
transformers' LlavaForConditionalGeneration as it comes: bf16 autocast over bf16 frozen weights, right padding, peft's
LoRA, fused AdamW, batches made beforehand (their loader costs nothing), with and without gradient checkpointing.
"liger" rows are these with Liger's kernels (pip install liger-kernel), as its own function puts them into a LLaVA.
Each row is a process of its own. A row counts only if its losses are finite, each weight that trains had a gradient,
the adapters moved and no record was left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.train_inputs import RECORDS, STAGES, make_inputs, recipe_of
from dianjing.config.schema import Recipe
from dianjing.data.collate import Batch
from dianjing.data.dataset import open_dataset
from dianjing.data.picture_tokens import FixedCount
from dianjing.layers.cuda_graphs import peak_bytes
from dianjing.plan.flops import flops
from dianjing.plan.lengths import lengths_of
from dianjing.plan.plan import make_plan
from dianjing.plan.shapes import INTERNLM2_1_8B
from dianjing.train.ranks import is_main, leave_group

ROOF = 790e12
"""Operations a second that an H200 reaches in a large bf16 product of random matrices."""
OURS: dict[str, dict[str, Any]] = {
    "stage1-bf16": {"stage": 1},
    "stage1-fp8": {"stage": 1, "quantization": "fp8"},
    "stage2-bf16": {"stage": 2},
    "stage2-fp8": {"stage": 2, "quantization": "fp8"},
    "stage2-exact": {"stage": 2, "dropout": 0.05},
    "stage2-exact-fp8": {"stage": 2, "quantization": "fp8", "dropout": 0.05},
}
UPSTREAM: dict[str, dict[str, Any]] = {
    "stage1-upstream": {"stage": 1, "checkpointing": False, "batch": 32},
    "stage1-upstream-64": {"stage": 1, "checkpointing": False, "batch": 64},
    "stage1-upstream-checkpointing": {"stage": 1, "checkpointing": True, "batch": 64},
    "stage2-upstream": {"stage": 2, "checkpointing": False, "batch": 8},
    "stage2-upstream-16": {"stage": 2, "checkpointing": False, "batch": 16},
    "stage2-upstream-24": {"stage": 2, "checkpointing": False, "batch": 24},
    "stage2-upstream-checkpointing": {"stage": 2, "checkpointing": True, "batch": 24},
    "stage1-liger-64": {"stage": 1, "checkpointing": False, "batch": 64, "liger": True},
    "stage1-liger-128": {"stage": 1, "checkpointing": False, "batch": 128, "liger": True},
    "stage2-liger-32": {"stage": 2, "checkpointing": False, "batch": 32, "liger": True},
}
"""Small batches, and multiples of them up to what should just fit in an H200; a row that does not fit is reported."""
STEPS = {1: (16, 6), 2: (30, 14)}
"""Of our rows by stage: how many, and how many are not counted. These bring most of the sizes that are new to a run."""
TOLD = 5000
"""Characters of what a failed row said that are printed: torchrun's own come last and take half of these."""
UPSTREAM_STEPS = (24, 12)
"""Of padded rows; almost each batch of theirs has a length of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/train_speed"))
    parser.add_argument("--only", default="", help="rows to run, by name, with commas")
    parser.add_argument("--steps", type=int, default=0, help="of each row; 0: STEPS, UPSTREAM_STEPS")
    parser.add_argument("--warm-up", type=int, default=-1, help="steps that are not counted; -1: the same")
    parser.add_argument("--gpus", type=int, default=1, help="of our rows; the records of a step are shared out")
    parser.add_argument("--limit", type=int, default=0, help="seconds after which a row is cut off; 0: none")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script itself")
    parser.add_argument("--profile", action="store_true", help="also write what the GPU spent its time on")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.row:
        run_row(chosen)
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    make_inputs(chosen.work, tiny=chosen.tiny)
    results = []
    for name in chosen.only.split(",") if chosen.only else [*OURS, *UPSTREAM]:
        began = time.perf_counter()
        gpus = chosen.gpus if name in OURS else 1
        command = [sys.executable, *(torchrun(gpus) if gpus > 1 else []), __file__, *sys.argv[1:], "--row", name]
        log = chosen.out / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:  # written as it comes: a row that is cut off has told what it did
            process = subprocess.Popen(command, stdout=file, stderr=file)
            try:
                code = process.wait(chosen.limit or None)
            except subprocess.TimeoutExpired:
                process.kill() if gpus == 1 else process.terminate()  # torchrun must live to end its processes
                process.wait()
                code = None
        said = log.read_text(encoding="utf-8").strip()
        if code != 0:
            why = "failed" if code else f"cut off after {chosen.limit} s"
            print(f"{name}: {why}: {said[-TOLD:]}", flush=True)
            continue
        results.append(json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"row"'))))
        print(f"{json.dumps(results[-1])}  ({time.perf_counter() - began:.0f} s in all)", flush=True)
        (chosen.out / "train_speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_row(chosen: argparse.Namespace) -> None:
    chosen.gpus = chosen.gpus if chosen.row in OURS else 1
    steps, warm_up = STEPS[OURS[chosen.row]["stage"]] if chosen.row in OURS else UPSTREAM_STEPS
    chosen.steps = chosen.steps or steps
    chosen.warm_up = min(warm_up, chosen.steps // 2) if chosen.warm_up < 0 else chosen.warm_up
    row = ours(chosen) if chosen.row in OURS else upstream(chosen)
    if row:
        print(json.dumps(row))


def torchrun(gpus: int) -> list[str]:
    """Return how python starts a script as so many ranks on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]


# Rows


def ours(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train with the product and read what it wrote, on the first of several ranks."""
    import dianjing.train.loop as loop
    from dianjing.train.loop import train

    recipe = new_run(chosen)
    stage, batch = OURS[chosen.row]["stage"], recipe.train.global_batch_size
    if chosen.profile:
        profile_steps(chosen.out / f"{chosen.row}.profile.txt", chosen.warm_up)
    gates: list[str] = []
    sensors = Sensors()
    loop._save = lambda parts, *_: gates.extend(never_learned(parts))  # instead of 7 GB that nobody reads
    began = time.time()
    with sensors:
        train(recipe, quiet=False)
    leave_group()
    assert not gates, f"never learned: {gates[:3]}"
    if not is_main():
        return {}
    journal = Path(recipe.output) / "train.jsonl"
    steps = [json.loads(line) for line in journal.read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    counted = steps[chosen.warm_up :]
    assert len(steps) == chosen.steps, "steps were left out"
    assert all(step["grad_norm"] > 0 for step in steps), "a step had no gradient"
    assert all(step["loss"] < 1e4 for step in steps), "a loss is no number"
    seconds = [batch / step["samples_per_second"] for step in counted]
    tokens, waited = (
        sum(step[name] * taken for step, taken in zip(counted, seconds, strict=True))
        for name in ("supervised_tokens_per_second", "data_wait")
    )
    return summary(chosen, stage, batch, seconds, steps) | {
        "data_wait_share": round(waited / sum(seconds), 4),
        "first_step_seconds": round(batch / steps[0]["samples_per_second"], 1),
        "total_seconds": round(time.time() - began, 1),
        "supervised_tokens_per_second": round(tokens / sum(seconds)),
        **sensors.read(last=sum(seconds)),
        "predicted_peak_gib": round(make_plan(recipe, []).plain.tensors / 2**30, 1),
    }


def new_run(chosen: argparse.Namespace) -> Recipe:
    """Return the recipe of one of our rows, the folder of its run empty."""
    settings = dict(OURS[chosen.row])
    stage = settings.pop("stage")
    batch = 8 if chosen.tiny else STAGES[stage]["global_batch_size"]
    recipe = recipe_of(chosen.work, stage, **settings, max_steps=chosen.steps, epochs=1000, global_batch_size=batch)
    if is_main():  # no other writes there
        shutil.rmtree(recipe.output, ignore_errors=True)
    return recipe


class Sensors(Thread):
    """The GPU's clock and power, read each second: a bf16 run that reaches the power limit lowers the clock."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._readings: list[tuple[float, int, float]] = []
        self._ended = Event()

    def __enter__(self) -> None:
        if torch.cuda.is_available():
            self.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def run(self) -> None:
        """Read until the end, or until the driver does not answer."""
        with suppress(Exception):
            while not self._ended.wait(1):
                self._readings.append((time.time(), torch.cuda.clock_rate(), torch.cuda.power_draw() / 1000))

    def read(self, last: float) -> dict[str, float]:
        """Return the medians of the last so many seconds, nothing where nothing was read."""
        if not self._readings:
            return {}
        since = self._readings[-1][0] - last
        clocks, watts = zip(*[reading[1:] for reading in self._readings if reading[0] >= since], strict=True)
        return {"mhz": statistics.median(clocks), "watts": round(statistics.median(watts))}


def never_learned(parts: Any) -> list[str]:
    """Return which of the weights that train never had a gradient, and which adapters are where they were."""
    state = parts.engine.optimizer_state()
    still = [name for name, value in state.items() if name.endswith("/exp_avg_sq") and not value.any()]
    return still + [name for name, weight in parts.engine.weights().items() if ".lora_B." in name and not weight.any()]


def summary(
    chosen: argparse.Namespace, stage: int, batch: int, seconds: list[float], steps: list[Any]
) -> dict[str, Any]:
    rate = batch / statistics.median(seconds)
    lengths = lengths_of(open_dataset(*encoder_of(chosen.work, stage)))
    assert chosen.tiny or lengths.records == RECORDS, "records were left out"
    work = flops(INTERNLM2_1_8B, recipe_of(chosen.work, stage), lengths).useful
    return {
        "row": chosen.row,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "samples_per_second": round(rate, 2),
        "spread": [round(batch / max(seconds), 2), round(batch / min(seconds), 2)],
        "tokens_per_second": round(rate * lengths.tokens),
        "gpus": chosen.gpus,
        "share_of_roof": round(rate * work / ROOF / chosen.gpus, 3),
        "tflop_per_sample": round(work / 1e12, 3),
        "peak_gib": round(peak_bytes(torch.device("cuda")) / 2**30, 1) if torch.cuda.is_available() else None,
        "tensors_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1) if torch.cuda.is_available() else None,
        "losses": [round(step["loss"], 4) for step in steps[:3]] + [round(steps[-1]["loss"], 4)],
    }


def encoder_of(work: Path, stage: int) -> Any:
    from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
    from dianjing.data.template import choose_template, get_template
    from dianjing.pictures.image import ImageProcessor

    recipe = recipe_of(work, stage)
    tokenizer = load_tokenizer(work / "llm")
    encoder = Encoder(
        tokenizer=tokenizer,
        template=get_template(choose_template(tokenizer)),
        picture_tokens=FixedCount(576),
        max_tokens=1472,
        on_long_record="error",
        image_token_id=image_token_id(tokenizer),
    )
    return recipe.data, encoder, ImageProcessor.from_folder(work / "tower", recipe.data.aspect)


def profile_steps(path: Path, first: int) -> None:
    """Let one step and the next one's beginning be profiled, after the warm-up."""
    import dianjing.train.loop as loop

    plain, taken = loop.take_step, [0]
    kinds = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else None  # the CPU is not held up
    profile = torch.profiler.profile(activities=kinds)

    def profiled(*arguments: Any, **named: Any) -> Any:
        taken[0] += 1
        if taken[0] == first:
            profile.start()
        result = plain(*arguments, **named)
        if taken[0] == first + 1:
            torch.accelerator.synchronize() if torch.accelerator.is_available() else None
            profile.stop()
            table = profile.key_averages().table(
                sort_by="self_device_time_total", row_limit=45, max_name_column_width=90
            )
            path.write_text(f"{idle(profile)}\n{table}", encoding="utf-8")
        return result

    loop.take_step = profiled


def idle(profile: Any, shown: int = 25) -> str:
    """Return how long the GPU had nothing to do, and between which pieces of work most of it was."""
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in events)
    gaps: list[tuple[float, str, str]] = []
    end, before = spans[0][0] if spans else 0.0, "(the start)"
    for start, stop, name in spans:
        if start > end:
            gaps.append((start - end, before, name))
        if stop > end:
            end, before = stop, name
    whole = end - spans[0][0] if spans else 0.0
    nothing = sum(gap[0] for gap in gaps) / 1e3
    lines = [
        f"two steps: {whole / 1e3:.1f} ms, of which nothing to do {nothing:.1f} ms; pieces of work: {len(spans):,}"
    ]
    for least, most in pairwise((0, 2, 5, 20, 100, 1000, math.inf)):
        among = [gap[0] for gap in gaps if least <= gap[0] < most]
        lines.append(f"  {len(among):6} gaps from {least} to {most} us: {sum(among) / 1e3:.1f} ms")
    for gap, before, name in sorted(gaps, reverse=True)[:shown]:
        lines.append(f"  {gap:9.1f} us  {before[:60]} ... {name[:60]}")
    return "\n".join(lines)


class Padded:
    """transformers' LLaVA as it comes, on padded batches: bf16 autocast, peft's own layers, fused AdamW."""

    def __init__(self, recipe: Recipe, *, checkpointing: bool = False, liger: bool = False) -> None:
        from peft.tuners.lora import Linear as PeftLinear

        from dianjing.layers.lora import LoraLinear
        from dianjing.model.build import build
        from dianjing.model.stage import apply_stage
        from dianjing.train.optim import make_optimizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        built = build(recipe, self.device)
        apply_stage(built.model, recipe)
        self.model: Any = built.model.train()
        self.model.set_attn_implementation("sdpa")
        for module in self.model.modules():
            if isinstance(module, LoraLinear):
                module.__class__ = PeftLinear
        if liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llava

            apply_liger_kernel_to_llava(model=self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = make_optimizer(self.model, recipe)
        self.dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
        self._padding: Any = built.tokenizer.pad_token_id
        self._trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def batch(self, indices: list[int]) -> tuple[Batch, list[Tensor], list[Tensor]]:
        """Return records as the product makes them, on the device, and their ids and labels one by one."""
        from benchmarks.cpu_step import rows

        batch = self.dataset.batch(indices)
        return batch.to(self.device), *rows(batch)

    def step(self, batch: Batch, ids: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take an optimizer step; return the loss and the gradients' norm."""
        from torch.nn.utils.rnn import pad_sequence

        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(
                input_ids=pad_sequence(ids, batch_first=True, padding_value=self._padding).to(self.device),
                attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self.device),
                labels=pad_sequence(labels, batch_first=True, padding_value=-100).to(self.device),
                pixel_values=batch.pixel_values if batch.num_images else None,
                use_cache=False,
            ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm


def upstream(chosen: argparse.Namespace) -> dict[str, Any]:
    """Train transformers' LLaVA on padded batches of the same records, made beforehand."""
    from dianjing.train.optim import set_learning_rates

    settings = UPSTREAM[chosen.row]
    stage, batch_size = settings["stage"], settings["batch"] if not chosen.tiny else 4
    padded = Padded(recipe_of(chosen.work, stage), checkpointing=settings["checkpointing"], liger="liger" in settings)
    set_learning_rates(padded.optimizer, 1.0)
    records = padded.dataset.num_records
    order = torch.randperm(records, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [
        padded.batch(order[step * batch_size : (step + 1) * batch_size])
        for step in range(min(chosen.steps, records // batch_size))
    ]
    seconds, steps = [], []
    for made in batches:
        began = time.perf_counter()
        loss, norm = padded.step(*made)
        assert norm.isfinite().item()
        assert norm.item() > 0
        seconds.append(time.perf_counter() - began)
        steps.append({"loss": loss.item()})
    return summary(chosen, stage, batch_size, seconds[chosen.warm_up :], steps) | settings


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
