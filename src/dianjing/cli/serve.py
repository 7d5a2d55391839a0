"""`dianjing serve MODEL`: an OpenAI-compatible server on this machine."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dianjing.cli.flags import parse
from dianjing.console import Console
from dianjing.errors import ConfigError, ModelError
from dianjing.run.layout import is_run

NAME = "serve"
SUMMARY = "answer over HTTP as OpenAI's API does, on this machine"
KEY = "DIANJING_SERVE_KEY"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing serve`; DIANJING_SERVE_KEY may hold a key that requests must bring."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, which is exported first, or a folder that `dianjing export` wrote."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8080
    """0 = any free one."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Program that computes the answers."""


def run(arguments: list[str]) -> int:
    """Serve until Ctrl-C."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if given.backend == "vllm" and shutil.which("vllm") is None:
        raise ConfigError("--backend vllm: there is no program vllm; install it: pip install vllm")

    # Slow to import, so a typing error is said before.
    from dianjing.serve.server import HOST, example, open_port, run_server, vllm_command

    key = os.environ.get(KEY, "")
    with open_port(given.port) as listening:
        port = listening.getsockname()[1]
        folder = servable(given.model, port, console)
        if given.backend == "transformers":
            console.print(f"loading {folder}")
            from dianjing.serve.transformers_server import transformers_app

            app, window = transformers_app(folder)
            from dianjing.serve.api import ApiGuard  # needs what transformers_app has found to be installed

            guard = ApiGuard(app=app, port=port, model=folder.name, window=window, key=key)
            console.print(f"serving {folder.name} at http://{HOST}:{port}/v1 to this machine only; Ctrl-C ends")
            console.print(example(port, folder.name, bool(key)))
            run_server(guard, listening)
            console.print("stopped")
            return 0
    console.print(f"vLLM serves {folder.name} at http://{HOST}:{port}/v1")
    console.print(example(port, folder.name, bool(key)))
    return subprocess.run(
        vllm_command(folder, port), env=os.environ | ({"VLLM_API_KEY": key} if key else {})
    ).returncode


def servable(model: str, port: int, console: Console) -> Path:
    """Return the Hugging Face folder of a model; a run is exported once for each of its checkpoints.

    Raises:
        ModelError: it is neither a run nor such a folder.
        ConfigError: it is a folder of GGUF files, which llama.cpp serves.
    """
    folder = Path(model).expanduser().resolve()
    if is_run(folder):
        return _exported(folder, console)
    if (folder / "text.gguf").is_file():
        command = (
            f"llama-server -m {folder / 'text.gguf'} --mmproj {folder / 'mmproj.gguf'} --jinja --no-cache-prompt "
            f"--host 127.0.0.1 --port {port}"
        )
        raise ConfigError(f"{model}: GGUF files are served by llama.cpp:\n  {command}")
    from dianjing.formats.config import read_config

    if not (folder / "config.json").is_file() or read_config(folder).get("model_type") != "llava":
        raise ModelError(f"{model}: neither a run nor a LLaVA that `dianjing export` wrote; give the folder of one")
    return folder


def _exported(run: Path, console: Console) -> Path:
    """Return the export of a run's newest checkpoint, made if it is not there yet."""
    from dianjing.data.cache import cache_folder
    from dianjing.export.export import export
    from dianjing.infer.load import load_for_use
    from dianjing.run.checkpoint import newest

    checkpoint = newest(run)
    state = f"{checkpoint} {checkpoint.stat().st_mtime_ns}"
    out = cache_folder("serve") / hashlib.sha256(state.encode()).hexdigest()[:16] / run.name
    if not out.is_dir():
        console.print(f"exporting {checkpoint} to {out}")
        export(load_for_use(str(run), "cpu"), out)
    return out
