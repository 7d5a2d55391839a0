"""`dianjing eval MODEL DATA`: how good the answers are by question type, and how much of it is sight."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.box import SIMPLE
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from dianjing.cli.flags import Asking, parse
from dianjing.console import Console
from dianjing.errors import ConfigError
from dianjing.eval.summary import SIGHT, WAYS, Figure
from dianjing.journal import JournalFile
from dianjing.language import say

if TYPE_CHECKING:
    from dianjing.eval.evaluate import Answers, Report

NAME = "eval"
SUMMARY = "score a model with the right picture, with another one, and with none"


@dataclass(frozen=True, kw_only=True)
class Arguments(Asking):
    """The command line of `dianjing eval`."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run, an exported folder, or the folder of a text LLM ("tinyworld")."""
    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
    """LLaVA JSON or JSONL with the questions and their answers, or a benchmark as its maker publishes it."""
    benchmark: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """A benchmark: mmbench (also CCBench), pope, mme, scienceqa, seed, ai2d, mmmu, gqa, textvqa, vqav2, vizwiz,
    chartqa, refcoco, or choices (your own file); its own length of answers is used."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Of a benchmark: write answers, scores and the file for its test server here; the same command goes on where it
    was stopped."""
    json: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Not of a benchmark: write the scores and every answer to this file; until then answers are kept in
    FILE.answers.jsonl, and the same command goes on where it was stopped."""


def require_one_use(given: Arguments) -> None:
    """Refuse flags that the way of scoring does not use.

    Raises:
        ConfigError: --out without a benchmark; --json or --max-new-tokens with one.
    """
    if not given.benchmark:
        if given.out:
            raise ConfigError("--out belongs to --benchmark; --json FILE writes the scores and answers of a data set")
        return
    if given.json:
        raise ConfigError("--json does not go with --benchmark; --out DIR writes its scores.json and predictions.jsonl")
    if given.max_new_tokens != Arguments.max_new_tokens:
        raise ConfigError("--max-new-tokens does not go with --benchmark, which has its own; remove it")


def run(arguments: list[str]) -> int:
    """Score a model on a data set; return the exit code."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    require_one_use(given)

    # Slow to import, so a typing error is said before.
    if given.benchmark:
        from dianjing.cli.benchmark import run_benchmark

        return run_benchmark(given.model, given.benchmark, given.data, given.images, given.out, given.limit)
    from dianjing.cli.questions import foreign_picture, read_questions, say_pictures
    from dianjing.eval.evaluate import evaluate, times_asked
    from dianjing.infer.load import load_for_use

    notices = Console(stderr=True)
    questions, root = read_questions(given.data, given, [given.model], notices)
    with foreign_picture(given, [given.model]) as foreign, Progress(console=notices, transient=True) as progress:
        loaded = load_for_use(given.model)
        task = progress.add_task("answering", total=times_asked(loaded, questions))
        advance = lambda count: progress.advance(task, count)  # noqa: E731
        with kept_answers(given) as said:
            began, before = time.perf_counter(), len(said)
            report = evaluate(loaded, questions, root, given.max_new_tokens, advance, foreign, said=said)
            seconds, asked = time.perf_counter() - began, len(said) - before
    kept = f", {before:,} were there already" if before else ""
    text = f"{asked:,} answers{kept} and the losses in {seconds:.1f} s: {asked / seconds:.1f} answers/s"
    notices.print(text, style="dim", markup=False, soft_wrap=True)
    say_pictures(questions, report.shown_foreign, given, notices)
    Console().print(table(report))
    _say_next(given, notices)
    if given.json:
        file = Path(given.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        _journal(file).unlink(missing_ok=True)
    return 0


def _say_next(given: Arguments, notices: Console) -> None:
    """Print the command that shows the answers, with the flags that were given."""
    flags = {"--data": given.data, "--images": given.images, "--other": given.other, "--out": "compare.html"}
    words = [word for flag, value in flags.items() if value for word in (flag, value)]
    limit = ["--limit", str(given.limit)] if given.limit else []
    command = f"dianjing compare BEFORE {shlex.join([given.model, *words, *limit])}"
    line = say("next, the answers side by side: {command}", command=command)
    notices.print(line, markup=False, highlight=False, soft_wrap=True)


def _journal(file: Path) -> Path:
    return file.with_name(f"{file.name}.answers.jsonl")


@contextmanager
def kept_answers(given: Arguments) -> Iterator[Answers]:
    """Give the answers of a run of this command that was stopped; with --json, new ones are written as they come.

    Raises:
        DataError: the file belongs to another model or another length of answers.
    """
    if not given.json:
        yield {}
        return
    from dianjing.cli.benchmark import state_of

    header = {"journal": "eval", "model": state_of(given.model), "max_new_tokens": given.max_new_tokens}
    journal = JournalFile(_journal(Path(given.json)), header, "give another --json")
    said = _Kept(journal)
    journal.open(said.take)
    try:
        yield said
    finally:
        journal.close()


class _Kept(dict[tuple[str, str, tuple[str, ...]], str]):
    """Answers that are on disk as soon as they are known."""

    def __init__(self, journal: JournalFile) -> None:
        super().__init__()
        self._journal = journal

    def take(self, line: dict[str, Any]) -> None:
        """Read a line of the journal."""
        super().__setitem__((str(line["root"]), str(line["question"]), tuple(line["images"])), str(line["answer"]))

    def __setitem__(self, key: tuple[str, str, tuple[str, ...]], answer: str) -> None:
        root, question, images = key
        self._journal.append({"root": root, "question": question, "images": images, "answer": answer})
        super().__setitem__(key, answer)


def table(report: Report) -> Table:
    """Return the scores as a table, a block a question type."""
    notes = [] if report.can_see else [say("It cannot see: a text-only model, asked without pictures.")]
    if not report.overall.exact_says_something:
        notes.append(say("Hardly an answer is exact: the sight that counts is that of the loss (nats a token)."))
    shown = Table(
        title=say("{model}: means with 95 % intervals", model=report.model),
        caption="\n".join(notes),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    shown.add_column(say("type (questions)"))
    for name in (*WAYS.values(), SIGHT):
        shown.add_column(say(name), justify="right", overflow="fold")
    for name, summary in {**report.by_type, "": report.overall}.items():
        style = "" if name else "bold"
        shown.add_section()
        shown.add_row(Text(f"{name or say('all')} ({summary.n:,})", style))
        for label, figures in summary.table():
            if any(figures):
                shown.add_row(f"  {say(label)}", *map(_cell, figures, (False, False, False, True)), style=style)
    return shown


def _cell(figure: Figure | None, signed: bool) -> str:
    if figure is None:
        return "-"
    mean = f"{figure.mean:+.3f}" if signed else f"{figure.mean:.3f}"
    return f"{mean} \\[{figure.low:.2f},{figure.high:.2f}]"
