"""The formats that a run is exported as: one table for the command, its help, the model card and the docs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from dianjing.errors import ExportError

if TYPE_CHECKING:
    from dianjing.export.receipt import Proof
    from dianjing.infer.generate import Conversation, LoadedModel

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """A user's choices; a format refuses an option that it does not take."""

    dtype: Dtype = "fp32"
    """Of the weights written."""
    quantize: str = "f16"
    """GGUF's type of the language model's weights."""
    verify: bool = False
    """Also let the format's own program answer (GGUF: llama.cpp)."""


DEFAULTS = Options()


class Code(Protocol):
    """The module of a format. `save` and `prove` raise ExportError, with the reason, for what it cannot hold."""

    LOADING: str
    """Markdown for the model card: how the folder is loaded."""

    def can_hold(self, tower: Any, projector: str, llm: Any) -> str | None:
        """Return None if the format can hold a model, else the reason.

        `tower` and `llm` are configurations of transformers, `projector` is a kind of model/projector.py.
        """
        ...

    def save(self, loaded: LoadedModel, folder: Path, options: Options) -> None:
        """Write the model into an existing folder."""
        ...

    def prove(
        self, loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options
    ) -> Proof:
        """Read the folder back as its readers do and return how it answers compared with the run."""
        ...


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table."""

    purpose: str
    """Use of the folder, in one line."""
    module: str
    """Name of the Code, imported only when needed: it is slow."""
    options: tuple[str, ...] = ()
    """Names of the Options that it takes."""
    learned_only: bool = False
    """The folder holds only what was learned, and needs the base models."""
    library: str | None = None
    """The library that the hub's page of the model suggests."""

    @property
    def code(self) -> Code:
        """The module."""
        return cast(Code, importlib.import_module(self.module))


FORMATS: Mapping[str, Format] = {
    "hf": Format(
        purpose="the whole model, for transformers, vLLM and whatever else reads LLaVA folders of the hub",
        module="dianjing.export.hf",
        options=("dtype",),
        library="transformers",
    ),
    "adapter": Format(
        purpose="only what was learned, for peft and dianjing, a few megabytes on the base models",
        module="dianjing.export.adapter",
        learned_only=True,
        library="peft",
    ),
    "xtuner": Format(
        purpose="only what was learned, for XTuner's chat and evaluation",
        module="dianjing.export.xtuner",
        learned_only=True,
    ),
    "llava": Format(
        purpose="for LLaVA 1.5's own code and what was built on it",
        module="dianjing.export.llava",
        options=("dtype",),
    ),
    "gguf": Format(
        purpose="for llama.cpp and Ollama",
        module="dianjing.export.gguf.format",
        options=("quantize", "verify"),
    ),
}


def find_format(name: str) -> Format:
    """Return the format of a name.

    Raises:
        ExportError: there is none.
    """
    if name not in FORMATS:
        raise ExportError(f'there is no export format "{name}"; there are {", ".join(FORMATS)}')
    return FORMATS[name]


def require_taken(name: str, options: Options) -> None:
    """Refuse options that a format does not take.

    Raises:
        ExportError: one was chosen.
    """
    taken = FORMATS[name].options
    for field in fields(options):
        if getattr(options, field.name) != field.default and field.name not in taken:
            others = " and ".join(f"--{other}" for other in taken) or "no such option"
            raise ExportError(f"--{field.name}: the format {name} does not take it (it takes {others}); drop it")
