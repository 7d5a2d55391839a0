"""The metrics of each step -> progress bar, train.jsonl, loss.svg, TensorBoard's files."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dianjing.console import Console
from dianjing.data.dataset import Dataset
from dianjing.data.record import few_pictures
from dianjing.language import say
from dianjing.layers.cuda_graphs import peak_bytes
from dianjing.model.stage import in_units
from dianjing.run.journal import Journal, read_journal
from dianjing.run.layout import BOARD, CURVE
from dianjing.train.closing import closing, seconds_until
from dianjing.train.curve import draw_curve
from dianjing.train.probe import RIGHT, sight_gap

SKIPPED_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Metrics of one optimizer step, over all ranks."""

    step: int
    """Counted from 1."""
    epoch: float
    loss: float
    """Mean over the supervised tokens."""
    learning_rate: float
    """Of the projector."""
    grad_norm: float
    """Before clipping."""
    records: int
    supervised_tokens: int
    seconds: float
    """From waiting for the batches to the new weights."""
    data_wait: float
    """The part of it spent waiting."""
    notes: tuple[str, ...] = ()
    """Changes of plan, such as smaller packs after running out of memory."""


class Log:
    """Log of a run; on ranks other than the main one it prints and writes nothing."""

    def __init__(self, run: Path, *, quiet: bool, write: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._run = run
        self._write = write

    def show(self, *renderables: RenderableType) -> None:
        """Print to the terminal."""
        self.console.print(*renderables, markup=False, soft_wrap=True)

    def busy(self, text: str) -> AbstractContextManager[object]:
        """Return a context in which a terminal shows that something is going on."""
        return self.console.status(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)

    def data(self, dataset: Dataset) -> None:
        """Print counts of the data, and the first skipped records."""
        self.show(say("data: {counts}", counts=dataset.counts))
        if dataset.opened:
            self.show(dataset.opened)
        if text := few_pictures(dataset.different_pictures):
            self.warn(text)
        for text in dataset.skipped[:SKIPPED_SHOWN]:
            self.warn(f"  skipped: {text}")
        if len(dataset.skipped) > SKIPPED_SHOWN:
            self.warn(f"  ... and {len(dataset.skipped) - SKIPPED_SHOWN} more")

    def peak_memory(self, device: torch.device) -> None:
        """Print the peak memory of this process: of its tensors on a GPU, of all of it on a CPU."""
        if device.type == "cuda":
            peak, of = peak_bytes(device), say("tensors on the GPU")
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            of = say("the whole process: libraries, weights, activations")
        self.show(say("peak memory: {size} ({of})", size=in_units(peak), of=of))

    def closing(self, run: Path) -> None:
        """Print how the run went, and what to do next."""
        if self._write:
            self.show(closing(read_journal(run)))
            self.show(
                say(
                    "{run} holds the checkpoint, loss.svg and train.jsonl; try: dianjing chat {run} --image PICTURE",
                    run=run,
                )
            )

    def steps(self, first_step: int, total_steps: int, log_every: int) -> StepLog:
        """Return the log of the steps after `first_step`; lines of later ones, now repeated, are dropped."""
        return StepLog(self, self._run if self._write else None, first_step, total_steps, log_every)


class StepLog:
    """Log of the steps of a run: a context entered before the first step and left after the last."""

    def __init__(self, log: Log, run: Path | None, first_step: int, total_steps: int, log_every: int) -> None:
        self._log, self._console = log, log.console
        self._run = run
        self._first_step, self._total_steps, self._log_every = first_step, total_steps, log_every
        self._window: list[StepResult] = []
        self._probes: list[dict[str, Any]] = []
        """Not written yet."""
        self._board: Any = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> StepLog:
        self._began, self._seconds_before = time.monotonic(), 0.0
        if self._run:
            self._journal = Journal(self._run, self._first_step, self._log.warn)
            self._seconds_before = seconds_until(self._journal.rows)
            if importlib.util.find_spec("tensorboard"):  # an extra
                from torch.utils.tensorboard.writer import SummaryWriter  # slow to import

                self._board = SummaryWriter(str(self._run / BOARD), purge_step=self._first_step + 1)
        self._progress.start()
        self._task = self._progress.add_task("step", total=self._total_steps, completed=self._first_step, metrics="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._run:
            self._journal.close()
        if self._board:
            self._board.close()

    def step(self, result: StepResult, *, last: bool = False) -> None:
        """Count a step; every log_every steps, and after the `last`, write a line."""
        self._window.append(result)
        due = last or result.step % self._log_every == 0 or result.step == self._total_steps
        metrics = self._metrics()
        line = say(
            "loss {loss:.4f}  rate {learning_rate:.2e}  {samples_per_second:.1f} samples/s",
            loss=metrics["loss"],
            learning_rate=metrics["learning_rate"],
            samples_per_second=metrics["samples_per_second"],
        )
        self._progress.update(self._task, completed=result.step, metrics=line)
        if not due:
            return
        if not self._console.is_terminal:
            self._console.print(say("step {step}/{total}", step=result.step, total=self._total_steps), "", line)
        if self._run:
            self._record(metrics, [note for result in self._window for note in result.notes])
        self._window = []

    def probe(self, found: dict[str, Any]) -> None:
        """Print what a probe has measured, and keep it for the next line."""
        self._probes.append(found)
        for name, losses in found.items():
            if name == "step":
                continue
            gap = sight_gap(losses)
            more = "" if gap is None else f", {gap:+.4f} with other pictures"
            self._console.print(f"step {found['step']}  {name.replace('_', '-')} probe: loss {losses[RIGHT]:.4f}{more}")

    def curve(self) -> None:
        """Draw the loss so far."""
        if self._run and self._journal.rows:
            draw_curve(self._journal.rows, self._run / CURVE)

    def _metrics(self) -> dict[str, float]:
        """Return the last step's values, loss and speeds over all steps since the last line."""
        seconds = sum(result.seconds for result in self._window)
        tokens = sum(result.supervised_tokens for result in self._window)
        last = asdict(self._window[-1])
        return {
            "step": last["step"],
            "epoch": last["epoch"],
            "loss": sum(result.loss * result.supervised_tokens for result in self._window) / tokens,
            "learning_rate": last["learning_rate"],
            "grad_norm": last["grad_norm"],
            "samples_per_second": sum(result.records for result in self._window) / seconds,
            "supervised_tokens_per_second": tokens / seconds,
            "data_wait": sum(result.data_wait for result in self._window) / seconds,
        }

    def _record(self, metrics: dict[str, float], notes: list[str]) -> None:
        now = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self._seconds_before + time.monotonic() - self._began, 3),
        }
        probes = {"probe": self._probes} if self._probes else {}
        self._journal.append({**metrics, **now, **({"notes": notes} if notes else {}), **probes})
        self._probes = []
        for name, value in metrics.items():
            if self._board and name != "step":
                self._board.add_scalar(f"train/{name}", value, int(metrics["step"]))
