"""`dianjing chat MODEL --image x.jpg`: ask about pictures in the terminal."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console

from dianjing.errors import ConfigError
from dianjing.use.chat import BLIND, Session, chat, open_picture
from dianjing.use.generate import MAX_NEW_TOKENS, Sampling
from dianjing.use.load import load_for_use

NAME = "chat"
SUMMARY = "ask a model about pictures"


def run(arguments: list[str]) -> int:
    """Answer one prompt, or talk until the user leaves."""
    parser = argparse.ArgumentParser(prog=f"dianjing {NAME}", description=SUMMARY)
    parser.add_argument("model", help='a run, an exported folder, or a text LLM ("tinyworld")')
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="shown with the first question; repeatable"
    )
    parser.add_argument("--prompt", help="ask this, print the answer and end")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest words (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.max_new_tokens < 1 or given.temperature < 0 or not 0 < given.top_p <= 1:
        raise ConfigError("--max-new-tokens must be at least 1, --temperature at least 0, --top-p in (0, 1]")
    images = [open_picture(path) for path in given.image]
    session = Session(
        seer=load_for_use(given.model),
        first_images=images,
        max_new_tokens=given.max_new_tokens,
        sampling=Sampling(temperature=given.temperature, top_p=given.top_p, seed=given.seed),
    )
    if given.prompt is None:
        chat(session, lambda: input("> "), _write)
        return 0
    if images and not session.seer.can_see:
        Console(stderr=True).print(f"{given.model}: {BLIND}", style="yellow")
    for piece in session.ask(given.prompt):
        _write(piece)
    _write("\n")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
