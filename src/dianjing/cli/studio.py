"""`dianjing studio FOLDER --data FILE`: a page on this machine to review records, follow runs and ask models."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import threading
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from dianjing.cli.flags import parse
from dianjing.config.load import find_recipe, load_recipe
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.extras import install
from dianjing.pictures.rule import PLAIN, PictureRule

if TYPE_CHECKING:
    from dianjing.studio.propose import Proposer
    from dianjing.studio.studio import Studio

NAME = "studio"
SUMMARY = "review records, follow runs and ask models on a page of this machine"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing studio`. The endpoint's key comes from DIANJING_API_KEY or OPENAI_API_KEY alone."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Path()
    """Its recipes and runs are shown; nothing else is read but what the flags name. This folder if not given."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """LLaVA JSON or JSONL to review; it is never changed, decisions are kept next to it."""
    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the pictures; the data file's own if not given."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="MODEL")] = ()
    """Run, exported folder or text LLM ("tinyworld") to ask, in addition to the folder's runs; may be repeated."""
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")] = ""
    """Show what the model of this recipe sees of a record; the folder's recipes and runs can be chosen too."""
    base_url: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """OpenAI-compatible endpoint that writes conversations for the shown picture."""
    model_name: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """The model, as the endpoint calls it."""
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 1024
    """The endpoint's longest reply in tokens."""
    timeout_seconds: float = 120.0
    """Longest time for one call to the endpoint."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 7878
    """0 = any free one."""
    no_browser: bool = False
    """Print the address and open nothing."""


def run(arguments: list[str]) -> int:
    """Serve the page until Ctrl-C."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    if not given.folder.is_dir():
        raise ConfigError(f"{given.folder}: there is no such folder; a data file is named with --data")
    if bool(given.base_url) != bool(given.model_name):
        raise ConfigError("--base-url and --model-name belong together; give both")
    if (given.images or given.base_url) and not given.data:
        raise ConfigError("--images and --base-url go with --data, the records to review")
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"the studio needs {' and '.join(missing)}: {install('studio')}")

    # Slow to import, so a typing error is said before.
    from dianjing.model.hub import ONLINE
    from dianjing.serve.page import PageGuard
    from dianjing.serve.server import HOST, open_port, run_server
    from dianjing.studio.app import build_app

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    # What a recipe of the folder names is not downloaded by looking at it; by a run that is started it may be.
    training = {name: os.environ[name] for name in (ONLINE,) if name in os.environ}
    os.environ[ONLINE] = "0"
    with open_port(given.port) as listening:
        with console.status("reading the data file"):
            studio = open_studio(given, console, training)
        try:
            port, token = listening.getsockname()[1], secrets.token_urlsafe(16)
            address = f"http://{HOST}:{port}/{token}/"
            console.print(f"the studio is at {address} for this machine only; Ctrl-C ends")
            if not given.no_browser:
                threading.Timer(0.5, webbrowser.open, [address]).start()
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: runs get their checkpoint
            app = PageGuard(app=build_app(studio), port=port, token=token)
            run_server(app, listening, studio.models.ending.set)
        finally:
            with console.status("stopping"):
                stopped = studio.close()
    for name in stopped:
        console.print(f"stopped {name} with a checkpoint; it goes on with dianjing train RECIPE --resume")
    console.print("stopped")
    return 0


def open_studio(given: Arguments, console: Console, training: Mapping[str, str]) -> Studio:
    """Return all that the page can reach, the data file open; `training` is the environment of runs it starts."""
    from dianjing.studio.models import Models
    from dianjing.studio.runs import Runs
    from dianjing.studio.session import ReviewSession
    from dianjing.studio.studio import Studio

    rule = PictureRule.of(load_recipe(find_recipe(given.recipe)).data) if given.recipe else PLAIN
    proposer = open_proposer(given, rule, console)
    return Studio(
        folder=given.folder.resolve(),
        runs=Runs(given.folder, given.images, training),
        models=Models(),
        named_models=given.model,
        recipe=given.recipe,
        proposer=proposer,
        session=ReviewSession(given.data, given.images, rule) if given.data else None,
    )


def open_proposer(given: Arguments, rule: PictureRule, console: Console) -> Proposer | None:
    """Return what asks the endpoint, None if none is named.

    Raises:
        ConfigError: its address is none, or the package that asks is missing.
    """
    if not given.base_url or not given.data:
        return None
    from dianjing.make.endpoint import check_base_url
    from dianjing.studio.propose import Proposer

    if importlib.util.find_spec("openai") is None:
        raise ConfigError(f"asking an endpoint needs the package openai: {install('make')}")
    if warning := check_base_url(given.base_url):
        console.print(f"warning: {warning}", style="yellow")
    return Proposer(
        root=given.images or str(given.data.parent),
        journal=given.data.with_name(f"{given.data.stem}.proposals.journal.jsonl"),
        base_url=given.base_url,
        model=given.model_name,
        max_tokens=given.max_tokens,
        timeout_seconds=given.timeout_seconds,
        white=rule.white,
    )
