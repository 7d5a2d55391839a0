"""LoadedModel -> its merged weights in one safetensors file, under the names that they have here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dianjing.errors import ExportError
from dianjing.export.files import save_weights
from dianjing.export.formats import Options
from dianjing.export.merge import merged_state
from dianjing.export.receipt import Proof, compare
from dianjing.infer.generate import Conversation, LoadedModel

LOADING = "`safetensors.torch.load_file`\n"


def can_hold(tower: Any, llm: Any) -> str | None:
    """Return None: names and numbers of any model."""
    return None


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write the weights."""
    save_weights({name: weight.clone() for name, weight in merged_state(loaded.model).items()}, folder)


def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return the comparison, once every tensor is read back as it was."""
    read = load_file(folder / "model.safetensors")
    if (
        any(not torch.equal(read.pop(name), weight.cpu()) for name, weight in merged_state(loaded.model).items())
        or read
    ):
        raise ExportError("plain: other weights were read back")
    return Proof(cases=compare(loaded, loaded, conversations), compared="every weight, bit for bit, against the run")
