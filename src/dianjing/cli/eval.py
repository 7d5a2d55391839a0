"""`dianjing eval MODEL DATA`: accuracy by question type, and how much of it is sight."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dianjing.cli.questions import add_data_arguments, read_questions
from dianjing.eval.evaluate import Report, evaluate, times_asked
from dianjing.eval.score import Summary
from dianjing.use.load import load_for_use

NAME = "eval"
SUMMARY = "score a model with the right picture, with another one, and with none"


def run(arguments: list[str]) -> int:
    """Score a model on a data set and print the table."""
    parser = argparse.ArgumentParser(prog=f"dianjing {NAME}", description=SUMMARY)
    parser.add_argument("model", help='a run, an exported folder, or a text LLM ("tinyworld")')
    parser.add_argument("data", help="LLaVA JSON or JSONL with the questions and their answers")
    add_data_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write scores and every answer to this file")
    given = parser.parse_args(arguments)
    notices = Console(stderr=True)
    questions, root = read_questions(given, notices)
    seer = load_for_use(given.model)
    with Progress(console=notices, transient=True) as progress:
        task = progress.add_task("answering", total=times_asked(seer, questions))
        report = evaluate(seer, questions, root, given.max_new_tokens, lambda count: progress.advance(task, count))
    Console().print(table(report))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n"
        given.json.write_text(text, encoding="utf-8")
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
