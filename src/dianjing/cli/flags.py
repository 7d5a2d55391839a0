"""Flags -> the dataclass of a verb."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], arguments: list[str], verb: str, summary: str) -> Arguments:
    """Return what the command line of a verb gives; tyro prints help and complaints and exits."""
    return tyro.cli(
        kind,
        args=arguments,
        prog=f"dianjing {verb}",
        description=summary,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How much of a data set `eval` and `compare` ask."""

    images: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of the pictures; the data file's own if not given."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Only the first N records; 0 = all."""
    max_new_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Longest answer in tokens."""
