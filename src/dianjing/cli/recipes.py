"""`dianjing recipes [copy NAME [DEST] | new DATA ...]`: the recipes that come with the package, and new ones."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.padding import Padding
from tyro.conf import Positional, arg

from dianjing.cli.flags import parse
from dianjing.config.fields import nearest
from dianjing.config.load import load_recipe, shipped_recipes
from dianjing.config.schema import Stage
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.model.folders import TINYWORLD

NAME = "recipes"
SUMMARY = "list the shipped recipes, copy one, or write those that fit your data"
DETAILS = """
dianjing recipes new DATA ... --llm DIR --vision-tower DIR writes the recipes of both stages for your data and models;
dianjing recipes new --help says more."""
NEW_SUMMARY = "write the recipes of both stages for your data and models"
NEW_DETAILS = """
Batch, epochs, rates and save points fit the number of records and the size of the LLM. Captions (files whose records
have type "caption" or "description", or a few questions for all pictures) are for the first stage, all others for the
second; with one kind alone both stages take it."""
PURPOSES: dict[Stage, str] = {
    "pretrain": "{}, stage 1: the projector alone learns to turn a picture into words.",
    "finetune": "{}, stage 2: projector and LoRA on the LLM learn to answer.",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line of `dianjing recipes`."""

    action: Positional[Literal["list", "copy"]] = "list"
    """The action."""
    name: Annotated[Positional[str], arg(metavar="[NAME]")] = ""
    """The recipe to copy."""
    dest: Annotated[Positional[Path], arg(metavar="[DEST]")] = Path()
    """File or folder to copy it to; this folder if not given."""


@dataclass(frozen=True, kw_only=True)
class NewArguments:
    """The command line of `dianjing recipes new`."""

    data: Annotated[Positional[tuple[str, ...]], arg(metavar="DATA ...")]
    """LLaVA JSON or JSONL to train on."""
    images: str = ""
    """Folder of the pictures; the data file's own if not given."""
    llm: str
    """Folder of the text LLM, owner/name on the hub, or "tinyworld"."""
    vision_tower: str
    """Folder of the vision tower, owner/name on the hub, or "tinyworld"."""
    held_out: str = ""
    """Records that are not trained on: a few are answered at each save point."""
    out: Annotated[Path, arg(metavar="DIR")] = Path()
    """Folder for the two files; this one if not given. Runs go to runs/ in the folder where training is started."""


def run(arguments: list[str]) -> int:
    """List the recipes, copy one, or write new ones."""
    if arguments[:1] == ["new"]:
        return _new(arguments[1:])
    given = parse(Arguments, arguments, NAME, f"{SUMMARY}\n{DETAILS}")
    if given.action == "copy":
        print(copy_shipped(shipped_recipes(), given.name, given.dest, "recipe"))
    else:
        _list()
    return 0


def _list() -> None:
    """Print the recipes, those that need no models first."""
    console = Console(highlight=False, markup=False)
    found = {name: (path, load_recipe(path).language_model.folder) for name, path in shipped_recipes().items()}
    for alone in (True, False):
        console.print(
            "These need no models of yours:" if alone else "These are for models on your disk, or on the hub:"
        )
        for name, (path, folder) in found.items():
            if (folder in ("", TINYWORLD)) == alone:  # "": another shipped recipe comes first
                purpose = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
                console.print(Padding(name, (0, 0, 0, 2)), style="bold")
                console.print(Padding(purpose, (0, 0, 0, 6)))
    console.print("dianjing recipes new DATA --llm DIR --vision-tower DIR writes recipes that fit your data.")


def _new(arguments: list[str]) -> int:
    given = parse(NewArguments, arguments, f"{NAME} new", f"{NEW_SUMMARY}\n{NEW_DETAILS}")
    if not given.data:
        raise ConfigError("no data is named; write dianjing recipes new DATA --llm DIR --vision-tower DIR")
    name = _shared_words(given.data)
    files: dict[Stage, Path] = {
        "pretrain": given.out / f"{name}_pretrain.toml",
        "finetune": given.out / f"{name}_finetune.toml",
    }
    for file in files.values():
        if file.exists():
            raise ConfigError(f"{file}: it already exists; remove it, or name another folder with --out")

    from dianjing.data.source import DataFile
    from dianjing.plan.fitted import as_text, divided, fitted  # slow to import: a wrong file is said before

    for path in (*given.data, *([given.held_out] if given.held_out else ())):
        DataFile(path)
    notices = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with notices.status("reading what models and records are like"):
        texts = {}
        for stage, paths in divided(given.data).items():
            values = _values(given, stage, paths, name)
            found = fitted(values)
            texts[stage] = as_text(found, PURPOSES[stage].format(name))
            train = found.recipe.train
            notices.print(
                f"{stage}: {', '.join(paths)}: {found.records:,} records, batch {train.global_batch_size}, "
                f"{train.epochs} epochs: {found.steps:,} steps, rate {train.learning_rate:g}, saved every "
                f"{train.save_every}"
            )
    given.out.mkdir(parents=True, exist_ok=True)
    for stage, file in files.items():
        file.write_text(texts[stage], encoding="utf-8")
        print(file)
    pretrain, finetune = (shlex.quote(str(file)) for file in files.values())
    notices.print(
        f"next: dianjing check --recipe {finetune}\n"
        f"      dianjing plan {finetune}\n"
        f"      dianjing train {pretrain} && dianjing train {finetune}"
    )
    return 0


def _shared_words(paths: tuple[str, ...]) -> str:
    """Return the words that the names of the data files begin with, or else the name of their folder."""
    words = zip(*(re.split(r"[-_. ]+", Path(path).stem) for path in paths), strict=False)
    common = [first for first, *others in words if others.count(first) == len(others)]
    return "_".join(common) or Path(paths[0]).resolve().parent.name


def _values(given: NewArguments, stage: Stage, paths: tuple[str, ...], name: str) -> dict[str, object]:
    """Return what the command line says of a recipe, by dotted field name."""
    values: dict[str, object] = {
        "stage": stage,
        "output": f"runs/{name}_{stage}",
        "language_model.folder": given.llm,
        "vision_tower.folder": given.vision_tower,
        "data.path": paths[0] if len(paths) == 1 else paths,
        "data.images": given.images,
        "train.sample_path": given.held_out,
    }
    return values | ({"projector.init_from": f"runs/{name}_pretrain"} if stage == "finetune" else {})


def copy_shipped(shipped: Mapping[str, Path], name: str, destination: Path, noun: str) -> Path:
    """Copy a file that comes with the package to a file or a folder, and return where it now is.

    Raises:
        ConfigError: there is no such file, or none may be written there.
    """
    if not name:
        raise ConfigError(f"name the {noun} to copy: {', '.join(shipped)}")
    if name not in shipped:
        offer = "".join(f"; did you mean '{other}'?" for other in nearest(name, shipped))
        raise ConfigError(f"{name}: no such shipped {noun}{offer} There are {', '.join(shipped)}")
    target = destination / shipped[name].name if destination.is_dir() else destination
    if target.exists():
        raise ConfigError(f"{target}: it already exists; remove it, or name another file")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first")
    shutil.copyfile(shipped[name], target)
    return target
