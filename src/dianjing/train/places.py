"""The folders and files of a run, looked at before anything slow is imported: a wrong one is said at once."""

from __future__ import annotations

from pathlib import Path

from dianjing.config.schema import Recipe
from dianjing.data.source import DataFile, open_files
from dianjing.errors import CheckpointError, ConfigError
from dianjing.model.folders import check_models, projector_source
from dianjing.run.layout import NOT_BEGUN, checkpoints


def check_places(recipe: Recipe, *, resume: bool) -> None:
    """Refuse a recipe that names something which is not there, or an output that is another run's.

    Raises:
        ConfigError: the output already holds a run, and this one does not go on with it.
        CheckpointError: it holds none, and this one does.
        DataError: a data file or the image folder is not there.
        ModelError: a model or the run of the projector is not there.
    """
    run = Path(recipe.output).expanduser()
    if not resume:
        require_new(run)
    elif not checkpoints(run):
        raise CheckpointError(f"{run}: {NOT_BEGUN}")
    check_models(recipe)
    open_files(recipe.data)
    if recipe.train.sample_every:
        DataFile(recipe.train.sample_path)
    if recipe.projector.init_from and not resume:
        projector_source(recipe.projector.init_from)


def require_new(run: Path) -> None:
    """Refuse to write over a run.

    Raises:
        ConfigError: the folder has checkpoints.
    """
    if found := checkpoints(run):
        raise ConfigError(
            f"{run}: it already holds a run, up to {found[-1].name}; give --resume to go on with it, or choose "
            "another output"
        )
