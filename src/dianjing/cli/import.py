"""`dianjing import SOURCE OUT`: a checkpoint of XTuner or LLaVA becomes a run, a GGUF file an LLM's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dianjing.cli.flags import parse
from dianjing.console import Console
from dianjing.errors import ConfigError

NAME = "import"
SUMMARY = "make a run of a checkpoint of XTuner or LLaVA, or an LLM's folder of a GGUF file"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing import`."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """iter_N.pth (file or DeepSpeed folder), a folder XTuner converted, mm_projector.bin, a LLaVA folder,
    or a GGUF file with a text LLM (which takes no flags)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, of a run or of the LLM; it must not exist."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """XTuner's config, where the checkpoint has none in it; it is read, never run."""
    llm: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the text LLM, if not where the checkpoint says."""
    vision_tower: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the vision tower, if not where the checkpoint says."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """The LLaVA JSON it was trained on; needed to train on."""
    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the data's pictures; the data file's own if not given."""
    template: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Chat template, if the checkpoint's config does not name one that we know."""
    gpus: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """GPUs the run had, where the checkpoint does not tell; 1 if not given."""
    llm_alpha: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0
    """Alpha of the LLM's LoRA, where no config tells it."""
    tower_alpha: Annotated[float, tyro.conf.arg(metavar="X")] = 0.0
    """Alpha of the vision tower's LoRA, where no config tells it."""
    weights_only: bool = False
    """Leave the optimizer's state out; the run can be asked and exported, not trained on."""


def run(arguments: list[str]) -> int:
    """Import a checkpoint and say what became of each tensor."""
    given = parse(Arguments, arguments, NAME, SUMMARY)

    # Slow to import, so a typing error is said before.
    from dianjing.formats.gguf import is_gguf
    from dianjing.importing.gguf import import_gguf
    from dianjing.importing.run import ImportOptions, import_run

    notices = Console(stderr=True)
    source, out = given.source.expanduser(), given.out.expanduser()
    options = ImportOptions(**{name: value for name, value in vars(given).items() if name not in ("source", "out")})
    with notices.status("reading the checkpoint and the models"):
        if not is_gguf(source):
            report = import_run(source, out, options)
        elif options == ImportOptions():
            report = import_gguf(source, out)
        else:
            raise ConfigError(
                f"{source}: a GGUF file is a text LLM alone; leave out the flags, which are for checkpoints"
            )
    for line in report:
        notices.print(line, markup=False, highlight=False, soft_wrap=True)
    print(given.out)
    return 0
