"""`dianjing plan RECIPE [--gpu NAME | --memory GIB [--tflops T]] [--gpus N] [--json] [--section.field VALUE ...]`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from dianjing.cli.flags import RunArguments, parse_with_recipe
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.model.folders import check_models
from dianjing.plan.gpus import GPUS, Gpu, any_gpu, find_gpu, gpu_here

NAME = "plan"
SUMMARY = "say before a run what it takes: memory by part, on which GPUs it fits, how long it lasts"
DETAILS = f"""
Of the models only config.json and the tokenizer are read, of the data only the records: nothing is trained, and no
weights are downloaded. Without --gpu and --memory it plans for the GPU of this machine; where there is none, for all
that it knows: {", ".join(gpu.name for gpu in GPUS)}.
Every field of a recipe is a flag too, and wins over the file: --data.pack-tokens 16384. --engine NAME is short for
--train.engine."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line of `dianjing plan`."""

    gpu: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """One of the GPUs named above."""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GIB")] = None
    """Any other GPU, by its memory."""
    tflops: Annotated[float | None, tyro.conf.arg(metavar="T")] = None
    """Its speed in bf16, dense, by the data sheet."""
    gpus: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Number of GPUs of that kind."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(arguments: list[str]) -> int:
    """Print the plan and return 0; whether it fits is in what is printed."""
    given = parse_with_recipe(Arguments, arguments, NAME, f"{SUMMARY}\n{DETAILS}")
    if given.recipe.start_from:
        from dianjing.start import settle  # slow to import

        given = replace(given, recipe=settle(given.recipe))
    gpus = _gpus(given)
    check_models(given.recipe, weights=False)

    from dianjing.export.refusals import as_lines, refusals
    from dianjing.plan.plan import make_plan  # slow to import: a typing error is said before
    from dianjing.plan.report import as_json, print_plan

    with Console(stderr=True).status("reading what models and records are like"):
        plan = make_plan(given.recipe, gpus or _here_or_all(), given.gpus)
    if given.json:
        print(json.dumps(as_json(plan) | {"not_exported_to": refusals(given.recipe)}))
    else:
        console = Console(highlight=False)
        print_plan(plan, given.path, console)
        for line in as_lines(refusals(given.recipe)):
            console.print(line, markup=False, soft_wrap=True)
    return 0


def _gpus(given: Arguments) -> Sequence[Gpu]:
    """Return the GPU that is asked about; none when none is named.

    Raises:
        ConfigError: the flags contradict each other, or one is out of range.
    """
    for name, value in (("memory", given.memory), ("tflops", given.tflops), ("gpus", given.gpus)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name}: a number above zero is needed, not {value}")
    if given.gpu is not None and given.memory is not None:
        raise ConfigError("--gpu and --memory are both given; one of them says which GPU")
    if given.tflops is not None and given.memory is None:
        raise ConfigError("--tflops is for a GPU that is not in the table; give its --memory too")
    if given.gpu is not None:
        return [find_gpu(given.gpu)]
    return [] if given.memory is None else [any_gpu(given.memory, given.tflops)]


def _here_or_all() -> Sequence[Gpu]:
    here = gpu_here()
    return [here] if here else GPUS
