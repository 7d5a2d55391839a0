"""A plan in words: a table of memory, what fits where, how long it takes; and the same as JSON."""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from dianjing.config.steps import few_steps, total_steps
from dianjing.console import Console
from dianjing.model.stage import in_units
from dianjing.plan.advice import changes, faster
from dianjing.plan.plan import Plan, Verdict

PER_RECORDS = 100_000
"""Records that hours are given for when it is not known how many there are."""
NARROW = 72
"""Columns of a terminal that hold the whole table of GPUs."""
INDENT = 17
"""Columns before what is said of each part."""
ON_A_CPU = (
    "This machine has no GPU. Training on its CPU works too, at a speed that is not predicted: add "
    "--train.max-steps 20 to dianjing train, and see."
)
WAITS = (
    "* The model is so small that a GPU waits for the CPU that starts its work: so it is as fast as others. Larger "
    "data.pack_tokens, where a step has the records for them, make it faster."
)
HONESTY = "Predicted, not measured: shapes and data sheets, by rows measured on one H200."


def print_plan(plan: Plan, name: str, console: Console) -> None:
    """Print a plan for a person; with one GPU, also what to change."""
    width = console.width if console.is_terminal else sys.maxsize

    def put(text: str, indent: int = 0, style: str = "") -> None:
        lines = textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False)
        console.print("\n".join(lines), markup=False, soft_wrap=True, style=style)

    for line in _heading(plan, name):
        put(line, INDENT)
    console.print(_memory_table(plan))
    console.print()
    if len(plan.verdicts) == 1:
        for line in _verdict_lines(plan, plan.verdicts[0]):
            put(line, 2)
    else:
        console.print(_gpu_table(plan, narrow=width < NARROW))
        put("More on one of them, and what to change: --gpu NAME")
        put(ON_A_CPU)
    if any(verdict.waits for verdict in plan.verdicts):
        put(WAITS)
    put(HONESTY, style="dim")


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan for a program; memory in bytes, numbers that are not known as null."""
    return {
        "parameters": dict(plan.weights.parameters),
        "trainable": dict(plan.weights.trainable),
        "lengths": {"source": plan.lengths.source, "tokens": plan.lengths.tokens, "records": plan.lengths.records},
        "memory": dict(plan.plain.parts),
        "memory_with_checkpointing": dict(plan.checkpointed.parts),
        "tflop_per_sample": plan.flops.useful / 1e12,
        "gpus": plan.gpus,
        "packs_per_step": plan.packs,
        "steps": total_steps(plan.recipe, plan.lengths.records) if plan.lengths.records else None,
        "verdicts": [_verdict_json(plan, verdict) for verdict in plan.verdicts],
    }


def _verdict_json(plan: Plan, verdict: Verdict) -> dict[str, Any]:
    known = not math.isnan(verdict.samples_per_second)
    return {
        "gpu": verdict.gpu.name,
        "memory": verdict.gpu.num_bytes,
        "needed": verdict.needed,
        "fits": verdict.fits,
        "refused": verdict.refused,
        "checkpointing": verdict.checkpointing,
        "samples_per_second": verdict.samples_per_second if known else None,
        "hours": plan.samples / verdict.samples_per_second / 3600 if known and plan.samples else None,
        "faster": faster(plan, verdict.gpu) if len(plan.verdicts) == 1 and verdict.fits else None,
        "changes": changes(plan, verdict.gpu) if len(plan.verdicts) == 1 and not verdict.fits else [],
    }


def _heading(plan: Plan, name: str) -> Iterator[str]:
    recipe, lengths = plan.recipe, plan.lengths
    on = f"{plan.gpus} GPUs, {recipe.train.engine}" if plan.gpus > 1 else "1 GPU"
    yield f"{name}: stage {recipe.stage}, {on}"
    for part, section in (("language_model", recipe.language_model), ("vision_tower", recipe.vision_tower)):
        trains = plan.weights.trainable[part]
        what = f", {trains:,} train ({_tuning(section)})" if trains else ", frozen"
        yield f"  {part.replace('_', ' '):15}{section.folder}: {plan.weights.parameters[part]:,} parameters{what}"
    yield f"  {'projector':15}{plan.weights.parameters['projector']:,} parameters, all train"
    yield f"  {'data':15}{lengths.source}"
    if lengths.longest > recipe.data.pack_tokens:
        yield (
            f"  {'':15}the longest has {lengths.longest:,} positions, more than data.pack_tokens: `dianjing train` "
            "will refuse it"
        )
    each = f"{lengths.tokens:,.0f} positions ({lengths.supervised:,.0f} supervised, {lengths.pictures:.2f} pictures)"
    yield f"  {'a record':15}{each}, {plan.flops.useful / 1e12:.2f} TFLOP"
    batch = plan.step_records
    packs = f"{plan.packs} pack{'s' if plan.packs > 1 else ''}{' on each GPU' if plan.gpus > 1 else ''}"
    yield (
        f"  {'a step':15}{batch} records in {packs} of at most {recipe.data.pack_tokens:,} positions, "
        f"about {plan.records_per_pack:.0f} records each"
    )
    if lengths.records:
        steps = total_steps(recipe, lengths.records)
        yield f"  {'the run':15}{few_steps(recipe, lengths.records) or f'{steps:,} steps'}"
    yield ""


def _tuning(section: Any) -> str:
    return f"LoRA, r = {section.lora_rank}" if section.tuning == "lora" else section.tuning


def _memory_table(plan: Plan) -> Table:
    table = Table(title="memory on each GPU, at its peak", title_justify="left", box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    table.add_column("part")
    for heading in ("", "checkpointing\nactivations"):
        table.add_column(heading, justify="right")
    saving = plan.checkpointed.parts
    for part, size in plan.plain.parts.items():
        table.add_row(part, in_units(size), in_units(saving[part]) if part in saving else "-")
    table.add_section()
    table.add_row("in all", in_units(plan.plain.total), in_units(plan.checkpointed.total), style="bold")
    return table


def _gpu_table(plan: Plan, *, narrow: bool) -> Table:
    """Return a row for each GPU; a narrow terminal gets name, time and verdict."""
    table = Table(title="where it runs", title_justify="left", box=None, pad_edge=False)
    table.padding = (0, 2, 0, 0)
    table.add_column("GPU", no_wrap=True)
    for heading in (_time_heading(plan),) if narrow else ("memory", "needed", "samples/s", _time_heading(plan)):
        table.add_column(heading, justify="right")
    table.add_column("")
    for verdict in plan.verdicts:
        known = verdict.fits and not math.isnan(verdict.samples_per_second)
        speed = f"{verdict.samples_per_second:.1f}{'*' * verdict.waits}" if known else ""
        time = _in_time(_hours(plan, verdict)) if known else ""
        sizes = (f"{verdict.gpu.gib:.0f} GiB", in_units(verdict.needed), speed)
        cells = (verdict.gpu.name, *(() if narrow else sizes), time, _in_short(verdict))
        table.add_row(*cells, style="" if verdict.fits else "dim")
    return table


def _in_short(verdict: Verdict) -> str:
    if verdict.refused:
        return verdict.refused
    if not verdict.fits:
        return "does not fit"
    return "fits, checkpointing" if verdict.checkpointing else "fits"


def _verdict_lines(plan: Plan, verdict: Verdict) -> Iterator[str]:
    gpu, said = verdict.gpu, plan.recipe.train.gradient_checkpointing
    name = f"{gpu.name} ({gpu.gib:.1f} GiB)" if not gpu.name.endswith("GiB") else gpu.name
    if verdict.refused:
        yield f'{name}: {verdict.refused}; language_model.quantization = "nf4" or "" runs there'
        return
    if verdict.fits:
        needed, why = f"{verdict.needed / 2**30:.1f} GiB needed", "" if said == "auto" else ", as the recipe says"
        if verdict.checkpointing and said == "auto":
            why = f" ({in_units(plan.plain.total)} without); the run turns it on by itself"
        how = "with" if verdict.checkpointing else "without"
        yield f"{name}: it fits {how} activation checkpointing, {needed}{why}."
        yield from _time_lines(plan, verdict)
        if better := faster(plan, gpu):
            words, speed = better
            yield f"The same result sooner: {words} ({speed:.1f} samples/s)."
        return
    yield f"{name}: it does NOT fit, {in_units(verdict.needed)} needed" + (
        ", even with activation checkpointing." if verdict.checkpointing else "."
    )
    found = changes(plan, gpu)
    if found:
        yield "One of these makes it fit:" if len(found) > 1 else "This makes it fit:"
        yield from (f"  {change}" for change in found)
    else:
        yield "No setting makes it fit: take a larger GPU, a smaller LLM, or more GPUs (--gpus N --engine fsdp2)."


def _time_lines(plan: Plan, verdict: Verdict) -> Iterator[str]:
    if math.isnan(verdict.samples_per_second):
        missing = "give --tflops (bf16, dense, by the data sheet)" if math.isnan(verdict.gpu.bf16) else "only bf16's is"
        yield f"Its speed is not known: {missing}."
        return
    run = f"{plan.samples:,} samples" if plan.samples else f"each {PER_RECORDS:,} records"
    speed = f"{verdict.samples_per_second:.1f}{'*' * verdict.waits} samples/s"
    yield f"{speed}, {_in_time(_hours(plan, verdict))} for {run}."


def _hours(plan: Plan, verdict: Verdict) -> float:
    return (plan.samples or PER_RECORDS) / verdict.samples_per_second / 3600


def _time_heading(plan: Plan) -> str:
    return "time" if plan.samples else f"time for\n{PER_RECORDS:,} records"


def _in_time(hours: float) -> str:
    if hours * 60 < 1:
        return "< 1 min"
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h"
