"""`dianjing compare A B [C] --data held_out.json --out compare.html`: the answers side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import Progress

from dianjing.cli.flags import Asking, parse
from dianjing.console import Console
from dianjing.errors import ConfigError

NAME = "compare"
SUMMARY = "show the answers of several models next to the pictures, on one HTML page"


@dataclass(frozen=True, kw_only=True)
class Arguments(Asking):
    """The command line of `dianjing compare`."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """Runs, exported folders, or folders of text LLMs ("tinyworld"): one column each."""
    data: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """LLaVA JSON or JSONL with the questions and their answers."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The page to write."""


def run(arguments: list[str]) -> int:
    """Write a page with the answers of every model to every question; return the exit code."""
    given = parse(Arguments, arguments, NAME, SUMMARY)
    if not given.models:
        raise ConfigError("no model is named; write dianjing compare MODEL MODEL --data FILE --out FILE")

    # Slow to import, so a typing error is said before.
    from dianjing.cli.questions import foreign_picture, read_questions, say_pictures
    from dianjing.eval.compare import Column, page
    from dianjing.eval.evaluate import evaluate, times_asked
    from dianjing.infer.answers import load_pictures
    from dianjing.infer.load import load_for_use, picture_rule

    notices = Console(stderr=True)
    questions, root = read_questions(given.data, given, given.models, notices)
    _require_writable(given.out)
    columns = []
    shown_foreign = 0
    with foreign_picture(given, given.models) as foreign, Progress(console=notices, transient=True) as progress:
        for name in given.models:
            task = progress.add_task(name, total=None)
            loaded = load_for_use(name)
            progress.update(task, total=times_asked(loaded, questions))
            advance = lambda count, task=task: progress.advance(task, count)  # noqa: E731
            report = evaluate(loaded, questions, root, given.max_new_tokens, advance, foreign)
            columns.append(Column.of_report(report))
            shown_foreign = report.shown_foreign
            del loaded  # before the next one is loaded
    say_pictures(questions, shown_foreign, given, notices)
    pictures = load_pictures(questions, root, picture_rule(given.models[0]))
    html = page(f"{Path(given.data).name}: side by side", questions, columns, pictures)
    given.out.write_text(html, encoding="utf-8")
    print(given.out)
    return 0


def _require_writable(out: Path) -> None:
    """Refuse a place that cannot be written before hours of answers are lost to it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new = not out.exists()
        out.open("a").close()
        if new:
            out.unlink()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another file") from None
