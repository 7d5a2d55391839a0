"""LoadedModel -> text.gguf and mmproj.gguf for llama.cpp, with a Modelfile for Ollama.

The package gguf is an extra: what needs it is imported only when a folder is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dianjing.errors import ExportError
from dianjing.export.formats import Options
from dianjing.export.gguf.text import TEXT_FILE, architecture
from dianjing.export.gguf.vision import VISION_FILE, check_tower
from dianjing.export.layout import not_held
from dianjing.export.receipt import Proof
from dianjing.infer.generate import Conversation, LoadedModel

LOADING = f"""\
llama.cpp: `llama-server -m {TEXT_FILE} --mmproj {VISION_FILE} --jinja --no-cache-prompt`

Ollama: `ollama create my-llava -f Modelfile`, then `ollama run my-llava`
"""


def can_hold(tower: Any, projector: str, llm: Any) -> str | None:
    """Return what llama.cpp has no place for, or would compute otherwise."""
    if reason := not_held("gguf", tower, projector):
        return reason
    try:
        architecture(llm)
        check_tower(tower)
    except ExportError as error:
        return str(error)
    return None


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write both files and the Modelfile.

    Raises:
        ExportError: llama.cpp has no place for a part of the model, or would compute it otherwise.
    """
    from dianjing.export.gguf.write import write_pair

    write_pair(loaded, folder, options)


def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the files, read back by transformers and with `verify` by llama.cpp, answer compared with the run.

    Raises:
        ExportError: a tensor is not the run's, or llama.cpp computes other features than the tower.
    """
    from dianjing.export.gguf.proof import prove_pair

    return prove_pair(loaded, folder, conversations, options.quantize, options.verify)
