"""Ctrl-C, SIGTERM and SIGHUP, heard at the end of a step."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


def stopping() -> list[int]:
    """Return the signals that stop a run; SIGHUP not under nohup, which has it ignored."""
    held = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if held else [signal.SIGHUP])]


class Stopped(Exception):
    """A run ended early because it was asked to; its checkpoint is written."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupt:
    """While entered, the first signal is kept in `number`; a second one ends the program as usual."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.number = 0
        self._quiet = quiet
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._hear) for number in stopping()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()
        if not self._quiet:
            sys.stderr.write("\nstopping after this step, with a checkpoint (once more: at once, without)\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
