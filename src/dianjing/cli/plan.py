"""`dianjing plan RECIPE [--gpu NAME | --memory GIB [--tflops T]] [--gpus N] [--json] [--section.field VALUE ...]`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from dianjing.cli.train import parse
from dianjing.config.load import load_recipe
from dianjing.errors import ConfigError
from dianjing.plan.gpus import GPUS, Gpu, any_gpu, find_gpu, gpu_here

NAME = "plan"
SUMMARY = "say before a run what it takes: memory by part, on which GPUs it fits, how long it lasts"
USAGE = (
    "usage: dianjing plan RECIPE [--gpu NAME | --memory GIB [--tflops T]] [--gpus N] [--json] "
    "[--section.field VALUE ...]"
)
INTRODUCTION = f"""
RECIPE is a TOML file or the name of a shipped recipe (`dianjing recipes` lists them). Of the models only config.json
and the tokenizer are read, of the data only the records: nothing is trained, and no weights are downloaded.
--gpu NAME       one of {", ".join(gpu.name for gpu in GPUS)}
--memory GIB     any other GPU, by its memory; --tflops T: its speed in bf16, dense, by the data sheet
--gpus N         that many of them; --engine NAME as in `dianjing train`
--json           one JSON object and nothing else
Without --gpu and --memory it plans for the GPU of this machine; where there is none, for all of the above.
Every field of a recipe is a flag too, and wins over the file: --data.pack-tokens 16384
"""


def run(arguments: list[str]) -> int:
    """Print the plan and return 0; whether it fits is in what is printed."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE + "\n" + INTRODUCTION)
        return 0 if arguments else 2
    path, switches, given = parse([word for word in arguments if word != "--json"], USAGE)
    if switches:
        raise ConfigError(f"--{min(switches)} is for `dianjing train`; {USAGE}")
    gpus = _gpus(given.pop("gpu", None), _number(given, "memory"), _number(given, "tflops"))
    number = _number(given, "gpus") or 1
    if number != int(number):
        raise ConfigError(f"--gpus: a whole number is needed, not {number:g}")
    recipe = load_recipe(path, given)

    from dianjing.plan.plan import make_plan  # slow to import: a typing error is said before
    from dianjing.plan.report import as_json, print_plan

    with Console(stderr=True).status("reading what models and records are like"):
        plan = make_plan(recipe, gpus or _here_or_all(), int(number))
    if "--json" in arguments:
        print(json.dumps(as_json(plan)))
    else:
        print_plan(plan, path, Console(highlight=False))
    return 0


def _gpus(name: str | None, memory: float | None, tflops: float | None) -> Sequence[Gpu]:
    """Return the GPU that is asked about; none when none is named."""
    if name is not None and memory is not None:
        raise ConfigError("--gpu and --memory are both given; one of them says which GPU")
    if tflops is not None and memory is None:
        raise ConfigError("--tflops is for a GPU that is not in the table; give its --memory too")
    if name is not None:
        return [find_gpu(name)]
    return [] if memory is None else [any_gpu(memory, tflops)]


def _here_or_all() -> Sequence[Gpu]:
    here = gpu_here()
    return [here] if here else GPUS


def _number(given: dict[str, str], name: str) -> float | None:
    """Take a flag's value out of what was given.

    Raises:
        ConfigError: it is no number above zero.
    """
    text = given.pop(name, None)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--{name}: a number above zero is needed, not {text!r}")
    return value
