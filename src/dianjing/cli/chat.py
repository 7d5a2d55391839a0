"""`dianjing chat MODEL --image x.jpg`: ask about pictures in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from dianjing.cli.flags import parse
from dianjing.console import Console
from dianjing.errors import ConfigError

NAME = "chat"
SUMMARY = "ask a model about pictures"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing chat`."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, or the folder of a text LLM ("tinyworld")."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE")] = ()
    """Picture shown with the first question; may be given several times."""
    prompt: str = ""
    """Ask this, print the answer and end."""
    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest word; 1 draws as the model thinks."""
    top_p: float = 1.0
    """Draw among the likeliest words that together have this probability."""
    seed: int = 0
    """Of what is drawn."""


def run(arguments: list[str]) -> int:
    """Answer one prompt, or talk until the user leaves."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    if given.max_new_tokens < 1 or given.temperature < 0 or not 0 < given.top_p <= 1:
        raise ConfigError("--max-new-tokens must be at least 1, --temperature at least 0, --top-p above 0, at most 1")

    # Slow to import, so a typing error is said before.
    from dianjing.infer.chat import BLIND, Session, chat, open_picture
    from dianjing.infer.generate import Sampling
    from dianjing.infer.load import load_for_use, picture_rule

    images = [open_picture(path, picture_rule(given.model)) for path in given.image]
    session = Session(
        loaded=load_for_use(given.model),
        first_images=images,
        max_new_tokens=given.max_new_tokens,
        sampling=Sampling(temperature=given.temperature, top_p=given.top_p, seed=given.seed),
    )
    if not given.prompt:
        chat(session, lambda: input("> "), _write)
        return 0
    if images and not session.loaded.can_see:
        Console(stderr=True).print(f"{given.model}: {BLIND}", style="yellow", markup=False)
    for piece in session.ask(given.prompt):
        _write(piece)
    _write("\n")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
