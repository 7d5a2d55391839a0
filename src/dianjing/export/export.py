"""LoadedModel -> a folder others can load, in one of FORMATS, which is kept only if it answers as the run does.

A format is a module with

    LOADING: str                                            Markdown for its model card: how it is loaded
    save(loaded, folder, options) -> None                     writes it into an existing folder
    prove(loaded, folder, conversations, options) -> Proof    reads it back as its readers do, and compares

Both raise ExportError, with the reason, for what the format cannot hold.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from safetensors import SafetensorError

from dianjing.errors import DianjingError, ExportError
from dianjing.export.card import write_card
from dianjing.export.receipt import Proof, drawn_cases, write_receipt
from dianjing.infer.generate import Conversation, LoadedModel

FORMATS = {
    "hf": "dianjing.export.hf",
    "adapter": "dianjing.export.adapter",
    "xtuner": "dianjing.export.xtuner",
    "llava": "dianjing.export.llava",
    "gguf": "dianjing.export.gguf",
}
"""Name of a format -> its module, imported only when it is asked for."""

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose; a format that a choice means nothing to refuses it when it is not the default."""

    dtype: Dtype = "fp32"
    """Of the weights written."""
    quantize: str = "f16"
    """GGUF's type of the language model's weights."""
    verify: bool = False
    """Also let the format's own program answer (GGUF: llama.cpp)."""


def export(
    loaded: LoadedModel,
    out: Path,
    conversations: Sequence[Conversation] = (),
    format: str = "hf",
    options: Options = Options(),
) -> Proof:
    """Write the model to `out` with its receipt and model card, and return what was compared.

    It is written beside `out` and gets its name last: a folder of that name is a proven export.

    Raises:
        ExportError: `out` exists, the model cannot be exported, or the export does not equal the run.
    """
    require_free(out)
    module = _module(format, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="unproven-", dir=out.parent, ignore_cleanup_errors=True) as place:
            unproven = Path(place, out.name)
            unproven.mkdir()
            module.save(loaded, unproven, options)
            proof = _prove(module, loaded, unproven, [*conversations, *drawn_cases()], options)
            write_receipt(loaded, unproven, format, proof)
            write_card(loaded, unproven, format, module.LOADING, proof)
            unproven.rename(out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written: {error}; make room, or choose another place") from error
    return proof


def require_free(out: Path) -> None:
    """Refuse to write over what is there, and to begin what could not get its name.

    Raises:
        ExportError: there is something of that name, or nothing can have it.
    """
    try:
        str(out).encode()
        out.lstat()
    except FileNotFoundError:
        return
    except UnicodeEncodeError:
        raise ExportError(f"{str(out)!a}: the name is not UTF-8; give another name") from None
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; give another name") from None
    raise ExportError(f"{out}: already there; remove it or give another name")


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin to write what will not fit.

    Raises:
        ExportError: the disk has too little room; both numbers are named.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ExportError(
            f"{folder}: the export takes {needed_bytes:,} bytes, but only {free:,} are free on this disk; make room "
            "or choose another place"
        )


def _module(format: str, options: Options) -> Any:
    if format not in FORMATS:
        raise ExportError(f'there is no export format "{format}"; there are {", ".join(FORMATS)}')
    if options.dtype not in get_args(Dtype):
        raise ExportError(f'dtype "{options.dtype}" is none of {", ".join(get_args(Dtype))}')
    return importlib.import_module(FORMATS[format])


def _prove(
    module: Any, loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options
) -> Proof:
    try:
        return module.prove(loaded, folder, conversations, options)
    except DianjingError:
        raise
    except Exception as error:  # whatever stops a stranger from reading it
        raise ExportError(f"the export cannot be read back, so it is not kept: {error}") from error
