"""How far long work is: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dianjing.console import Console

Watch = Callable[[str, int, int], None]
"""Called with the name of the work, how much is done and how much there is."""
SAID_EVERY_SECONDS = 30.0


@contextmanager
def watched(console: Console) -> Generator[Watch]:
    """Return what shows the work on a console."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        said = time.monotonic()

        def watch(name: str, done: int, total: int) -> None:
            nonlocal said
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)
            if not console.is_terminal and time.monotonic() - said > SAID_EVERY_SECONDS:
                said = time.monotonic()
                console.print(f"{name}: {done / total:.0%}", markup=False, soft_wrap=True)

        yield watch
