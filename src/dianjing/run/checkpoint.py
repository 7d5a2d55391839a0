"""Checkpoints: private to training, exact, and either whole or not there.

A checkpoint is written under another name, flushed to the disk and renamed. Whoever reads it checks the manifest.
Its files are listed in layout.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dianjing.errors import CheckpointError
from dianjing.run.layout import (
    CHECKPOINTS,
    MANIFEST,
    NOT_BEGUN,
    OPTIMIZER,
    STATE,
    TRAINABLE,
    checkpoint_folder,
    checkpoints,
    is_run,
    step_of,
)
from dianjing.run.state import TrainState, require_same_run

WRITING = ".writing-"
"""How the name of a checkpoint begins until it is whole."""
SPARE = 1.1
"""Free space asked for, as a multiple of the bytes that will be written."""


def save(
    run: Path, trainable: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: TrainState, keep: int
) -> Path:
    """Write the checkpoint of a step, then delete all but the `keep` newest and that of the lowest held-out loss.

    Raises:
        CheckpointError: it cannot be written; the earlier ones are as they were.
    """
    final = checkpoint_folder(run, state.step)
    writing = final.with_name(WRITING + final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for unfinished in final.parent.glob(f"{WRITING}*"):
            shutil.rmtree(unfinished)
        require_space(run, sum(weight.nbytes for weight in (*trainable.values(), *optimizer.values())))
        writing.mkdir()
        _write(writing, trainable, optimizer, state)
        if final.exists():  # damaged: the run was resumed from an earlier one
            shutil.rmtree(final)
        writing.rename(final)
        _flush(final.parent)
        _rotate(run, state.step, keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        earlier = "earlier checkpoints are untouched, --resume goes on from the newest"
        raise CheckpointError(
            f"{final}: the checkpoint cannot be written: {error}; make room or choose another output; "
            f"{earlier if checkpoints(run) else 'no step is saved yet'}"
        ) from None
    return final


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to write what will not fit.

    Raises:
        CheckpointError: the disk has too little room; both numbers are named.
    """
    needed, free = int(needed_bytes * SPARE), shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {needed:,} bytes are needed for checkpoints, but only {free:,} are free on this disk; make "
            "room, lower train.keep or choose another output"
        )


def newest(run: Path, notify: Callable[[str], object] | None = None) -> Path:
    """Return the newest checkpoint that is whole; `notify` (default: stderr) gets a line for each that is passed over.

    Raises:
        CheckpointError: no checkpoint is whole.
    """
    notify = notify or (lambda text: print(text, file=sys.stderr))
    passed_over: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        fault = damage(checkpoint)
        if not fault:
            for text in passed_over:
                notify(f"passed over {text}; using {checkpoint.name}")
            return checkpoint
        passed_over.append(f"{checkpoint}: {fault}")
    if passed_over:
        raise CheckpointError("\n  ".join([f"{run}: no checkpoint is whole:", *passed_over]))
    raise CheckpointError(f"{run}: {NOT_BEGUN}")


def find_checkpoint(path: Path, notify: Callable[[str], object] | None = None) -> Path | None:
    """Return the checkpoint at `path`, or the newest whole one of the run at `path`; None when it is neither.

    Raises:
        CheckpointError: the checkpoint is damaged, or the run has none that is whole.
    """
    if (path / TRAINABLE).is_file() or (path / MANIFEST).is_file():
        if fault := damage(path):
            raise CheckpointError(f"{path}: damaged: {fault}; name another checkpoint, or the run's folder")
        return path
    return newest(path, notify) if is_run(path) or (path / CHECKPOINTS).is_dir() else None


def damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, "" for nothing: every byte is read."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return "" if files.keys() == {TRAINABLE, OPTIMIZER, STATE} else f"{MANIFEST} does not name all files"


def read_state(checkpoint: Path) -> TrainState:
    """Return how far the run was."""
    return TrainState.from_json((checkpoint / STATE).read_text(encoding="utf-8"))


def state_to_resume(
    checkpoint: Path, start: TrainState, notify: Callable[[str], object], allowed: Collection[str] = ()
) -> TrainState:
    """Return the state of a checkpoint, for the run that `start` is the beginning of.

    `notify` gets a line when the checkpoint does not say which base models the run began with, and on each change
    that is `allowed`.

    Raises:
        CheckpointError: the checkpoint is of another recipe, or the data or base models have changed since.
    """
    saved = read_state(checkpoint)
    changes = require_same_run(saved, start, checkpoint, allowed)
    for change in changes:
        notify(f"{checkpoint}: allowed to have changed: {change}")
    if not saved.fingerprints:
        notify(f"{checkpoint} is of an older version: whether base models or pictures have changed is not known")
    return replace(
        saved,
        data=start.data,
        fingerprints={**saved.fingerprints, **start.fingerprints},
        allowed_changes=(*saved.allowed_changes, *changes),
    )


def _write(folder: Path, trainable: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: TrainState) -> None:
    save_file(dict(trainable), folder / TRAINABLE)
    save_file(dict(optimizer), folder / OPTIMIZER)
    (folder / STATE).write_text(state.to_json(), encoding="utf-8")
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
        for name in (TRAINABLE, OPTIMIZER, STATE)
    }
    (folder / MANIFEST).write_text(json.dumps({"step": state.step, "files": files}, indent=1), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _rotate(run: Path, step: int, keep: int) -> None:
    """Keep the newest up to `step`; a later one was found damaged when the run was resumed."""
    usable = [path for path in checkpoints(run) if step_of(path) <= step]
    for path in _others(checkpoints(run), [*usable[-keep:], *best(usable)]):
        doomed = path.rename(path.with_name(WRITING + path.name))
        shutil.rmtree(doomed)


def best(found: Sequence[Path]) -> list[Path]:
    """Return the checkpoint with the lowest held-out loss, the earliest of equal ones; none if it was not measured."""
    losses: list[tuple[float, Path]] = []
    for path in found:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # damaged: it is not the best
            loss = read_state(path).held_out_loss
            losses += [] if loss is None else [(loss, path)]
    return [min(losses, key=lambda one: one[0])[1]] if losses else []


def _others(paths: list[Path], kept: list[Path]) -> Iterator[Path]:
    return (path for path in paths if path not in kept)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
