"""Several ranks, one error message: only the first rank that fails reports."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch.distributed as dist

from dianjing.errors import DianjingError, TrainError
from dianjing.train.interrupt import Stopped

SILENCE_MINUTES = 10
"""How long a rank waits for the others before it gives up."""


def is_main() -> bool:
    """Return whether this process is the first of those that train together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_error() -> Generator[None]:
    """Raise an error on the rank that failed first; end the other ranks silently, with the same exit code."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        first = _first_to_fail()
        if not _is_ours(error):
            raise
        if not first:
            raise SystemExit(DianjingError.exit_code) from None
        if isinstance(error, DianjingError):
            raise
        raise TrainError(
            f"rank {dist.get_rank()} lost the others: one of them ended, or none answered for {SILENCE_MINUTES} "
            f"minutes ({str(error).splitlines()[0]}); --resume goes on from the last checkpoint"
        ) from None


def leave_group() -> None:
    """Leave the process group at the end of a program; torch warns otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_ours(error: Exception) -> bool:
    """Return whether an error is a DianjingError or comes from communication with other ranks."""
    return isinstance(error, DianjingError | dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _first_to_fail() -> bool:
    """Return whether no rank has failed before; False if the main rank, which counts them, is gone."""
    try:
        return dist.distributed_c10d._get_default_store().add("dianjing/failed", 1) == 1
    except RuntimeError:
        return False
