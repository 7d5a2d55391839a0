"""`dianjing train RECIPE [--resume] [--gpus N] [--engine NAME] [--section.field VALUE ...]`."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dianjing.cli.flags import RunArguments, parse_with_recipe
from dianjing.config.schema import Recipe
from dianjing.errors import ConfigError, ModelError
from dianjing.language import say
from dianjing.train.launch import LAUNCHED

NAME = "train"
BUSY = 0.5
"""Load of the last minute from which somebody else computes."""
SUMMARY = "train what a recipe says"
DETAILS = """
Every field of a recipe is a flag too, and wins over the file: --train.learning-rate 1e-3. --engine NAME is short for
--train.engine. Several machines: torchrun --nnodes ... -m dianjing train RECIPE"""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunArguments):
    """The command line of `dianjing train`."""

    resume: bool = False
    """Go on from the newest checkpoint of the recipe's output folder."""
    quiet: bool = False
    """Print errors only."""
    allow_changed: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction] = ()
    """An input that may differ from that of the checkpoint, or of the run that the projector comes from; the error
    about it says the name. May be given several times; the run writes it down."""
    gpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Train on N GPUs of this machine."""


def run(arguments: list[str]) -> int:
    """Train, and return 0; or 128 and the signal's number when a signal stopped the run."""
    given = parse_with_recipe(Arguments, arguments, NAME, f"{SUMMARY}\n{DETAILS}")
    if given.allow_changed:
        _check_allowed(given.allow_changed)
    from dianjing.train.places import check_places  # not for the help

    recipe = _with_start(given)
    if "WORLD_SIZE" not in os.environ:  # ranks say it together, once
        check_places(recipe, resume=given.resume)
    if given.gpus is not None and LAUNCHED not in os.environ:
        from dianjing.train.launch import launch

        return launch(given.gpus, arguments)

    _wait_passively_if_busy()

    from dianjing.train.interrupt import Stopped
    from dianjing.train.launch import end_with_launcher
    from dianjing.train.loop import train  # slow to import: a typing error in the recipe is said before
    from dianjing.train.ranks import is_main, leave_group

    end_with_launcher()
    if is_main() and not given.quiet:
        _say_refusals(recipe)
    try:
        train(recipe, resume=given.resume, quiet=given.quiet, allow_changed=given.allow_changed)
    except Stopped as stopped:
        if is_main():
            again = arguments if given.resume else [*arguments, "--resume"]
            line = say("{stopped}; go on with: dianjing train {words}", stopped=stopped, words=shlex.join(again))
            print(line, file=sys.stderr)
        leave_group()
        return stopped.exit_code
    leave_group()
    return 0


def _with_start(given: Arguments) -> Recipe:
    """Return the recipe with what start_from brings; the process that the user began says what that is."""
    if not given.recipe.start_from:
        return given.recipe
    from dianjing.train.places import require_new

    if not given.resume:
        require_new(Path(given.recipe.output).expanduser())
    quiet = given.quiet or "WORLD_SIZE" in os.environ
    from dianjing.start import settle  # slow to import

    return settle(given.recipe, (lambda _: None) if quiet else _print, write=not given.resume)


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def _check_allowed(names: tuple[str, ...]) -> None:
    """Refuse names that no input has.

    Raises:
        ConfigError: the names there are.
    """
    from dianjing.run.state import ALLOWABLE
    from dianjing.train.start_checks import CAN_DIFFER

    known = dict.fromkeys((*ALLOWABLE, *CAN_DIFFER))
    for name in names:
        if name not in known:
            raise ConfigError(f"--allow-changed {name}: there is no such input; choose from {', '.join(known)}")


def _wait_passively_if_busy() -> None:
    """Let threads on a CPU sleep where they wait for each other if other processes compute; set before torch is loaded.

    A thread that has lost its core keeps the others spinning: next to one busy process that costs more than waking.
    """
    if os.getloadavg()[0] >= BUSY:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _say_refusals(recipe: Recipe) -> None:
    """Print which export formats cannot hold the model."""
    from dianjing.export.refusals import as_lines, refusals

    try:
        lines = as_lines(refusals(recipe))
    except ModelError:  # training says it, in its own order
        return
    for line in lines:
        print(line, file=sys.stderr)
