"""The terminal, whose reader may go away."""

from __future__ import annotations

import rich.console

from dianjing.output import discard


class Console(rich.console.Console):
    """A console whose reader may go away: on standard output that ends the verb, on standard error nothing is lost."""

    def on_broken_pipe(self) -> None:
        """Write nothing more.

        Raises:
            BrokenPipeError: of standard output, for `main` to end with.
        """
        discard(2 if self.stderr else 1)
        if not self.stderr:
            raise BrokenPipeError
