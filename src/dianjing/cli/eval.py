"""`dianjing eval MODEL DATA`: accuracy by question type, and how much of it is sight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dianjing.cli.flags import Asking, parse

if TYPE_CHECKING:
    from dianjing.eval.evaluate import Report
    from dianjing.eval.score import Summary

NAME = "eval"
SUMMARY = "score a model with the right picture, with another one, and with none"


@dataclass(frozen=True, kw_only=True)
class Arguments(Asking):
    """What the command line gives."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, or the folder of a text LLM ("tinyworld")."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """LLaVA JSON or JSONL with the questions and their answers."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Write the scores and every answer to this file."""


def run(arguments: list[str]) -> int:
    """Score a model on a data set and print the table."""
    given = parse(Arguments, arguments, NAME, SUMMARY)

    # Slow to import, so a typing error is said before.
    from dianjing.cli.questions import read_questions
    from dianjing.eval.evaluate import evaluate, times_asked
    from dianjing.infer.load import load_for_use

    notices = Console(stderr=True)
    questions, root = read_questions(given.data, given, notices)
    loaded = load_for_use(given.model)
    with Progress(console=notices, transient=True) as progress:
        task = progress.add_task("answering", total=times_asked(loaded, questions))
        report = evaluate(loaded, questions, root, given.max_new_tokens, lambda count: progress.advance(task, count))
    Console().print(table(report))
    if given.json:
        file = Path(given.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


def table(report: Report) -> Table:
    """Return the scores as a table, one row a question type."""
    caption = "" if report.can_see else "It cannot see: a text-only model, asked without pictures."
    shown = Table(title=report.model, caption=caption, title_justify="left", caption_justify="left")
    shown.add_column("question type")
    for name in ("n", "exact", "token F1", "other picture", "no picture", "sight"):
        shown.add_column(name, justify="right")
    for name, summary in report.by_type.items():
        shown.add_row(name, *_cells(summary))
    shown.add_section()
    shown.add_row("all", *_cells(report.overall), style="bold")
    return shown


def _cells(summary: Summary) -> list[str]:
    shares = (summary.accuracy, summary.f1, summary.accuracy_other_picture, summary.accuracy_no_picture)
    sight = "-" if summary.sight is None else f"{summary.sight:+.3f}"
    return [str(summary.n), *("-" if share is None else f"{share:.3f}" for share in shares), sight]
