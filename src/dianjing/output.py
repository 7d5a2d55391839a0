"""Standard output takes any character, to a reader that may go away."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def discard(descriptor: int) -> None:
    """Send what is still written to standard output (1) or standard error (2) nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def open_output() -> None:
    """Let standard output take any character: what its encoding lacks is written as on standard error, \\u4e2d."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def finish_output() -> None:
    """Write what is still held back, to whom still reads."""
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            discard(descriptor)
