"""Every error a user can meet.

    DianjingError           exit code 2: something the user can correct
    |-- ConfigError         a recipe or a flag
    |-- DataError           a record, a picture, a data file
    |-- ModelError          a model folder, weights that do not fit, a template
    |-- TrainError          a run that must not go on (NaN, nothing to learn from)
    |-- CheckpointError     a checkpoint that is missing, torn, or of another run
    `-- ExportError         an export that does not equal its run

A message says what is wrong with the value, where it stands and what to do about it.
The command line prints it without a traceback; our own faults stay plain exceptions.
"""

from __future__ import annotations


class DianjingError(Exception):
    """Base of all errors that are the input's, not the program's."""

    exit_code = 2


class ConfigError(DianjingError):
    """A recipe or a flag cannot be used as written."""


class DataError(DianjingError):
    """A data file, a record or a picture cannot be used."""


class ModelError(DianjingError):
    """A model folder, its weights, its tokenizer or its template do not fit."""


class TrainError(DianjingError):
    """A run was stopped because going on would waste it."""


class CheckpointError(DianjingError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ExportError(DianjingError):
    """An export was refused because it does not equal its run."""


LONGEST_REASON = 300
"""Characters: what a foreign file makes a message say must not fill the screen."""


def shortened(reason: object) -> str:
    """Return a text, cut off where it is longer than a message needs."""
    text = str(reason)
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}... ({len(text):,} characters)"
