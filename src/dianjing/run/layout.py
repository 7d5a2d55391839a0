"""Names of the files in a run's folder.

runs/x/
    recipe.toml             the recipe, all fields written out
    start/                  the model that start_from named, merged, where its tuning was another
    run.lock                process and host that write the run, while one does
    checkpoints/
        step-000100/
            trainable.safetensors   what trains, by its names in the live model
            optimizer.safetensors   the optimizer state of it
            state.json              how far the run is: TrainState
            manifest.json           size and SHA-256 of the three; written last
    train.jsonl             one line of metrics every train.log_every steps
    loss.svg                the same, drawn
    tensorboard/            the same, if TensorBoard is installed (extra tensorboard)
    samples.jsonl           sample answers, if the recipe asks for them
    samples.html            the same, as a page
"""

from __future__ import annotations

from pathlib import Path

RECIPE = "recipe.toml"
LOCK = "run.lock"
START = "start"
CHECKPOINTS = "checkpoints"
TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "manifest.json"
JOURNAL = "train.jsonl"
CURVE = "loss.svg"
BOARD = "tensorboard"
SAMPLES = "samples.jsonl"
SAMPLES_PAGE = "samples.html"
STEP = "step-"
"""How the name of a checkpoint begins; the number of its step follows."""
NOT_BEGUN = "there is no checkpoint in it; train without --resume first, or name another run"


def is_run(folder: Path) -> bool:
    """Return whether a folder has a recipe: it is a run, or an adapter exported from one."""
    return (folder / RECIPE).is_file()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return run / CHECKPOINTS / f"{STEP}{step:06d}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, whole or damaged."""
    return sorted((run / CHECKPOINTS).glob(f"{STEP}*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps before a checkpoint, by its name; -1 if the name has no number."""
    number = checkpoint.name.removeprefix(STEP)
    return int(number) if number.isdecimal() else -1
