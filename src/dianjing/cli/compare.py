"""`dianjing compare A B [C] --data held_out.json`: one page with the answers side by side."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from dianjing.cli.questions import add_data_arguments, read_questions
from dianjing.eval.score import score, summarise
from dianjing.use.ask import ask, load_pictures
from dianjing.use.compare import Column, page
from dianjing.use.load import load_for_use

NAME = "compare"
SUMMARY = "put the answers of several models beside the pictures, on one HTML page"


def run(arguments: list[str]) -> int:
    """Ask every model every question and write the page."""
    parser = argparse.ArgumentParser(prog=f"dianjing {NAME}", description=SUMMARY)
    parser.add_argument("models", nargs="+", help='runs, exported folders or text LLMs ("tinyworld")')
    parser.add_argument("--data", required=True, help="LLaVA JSON or JSONL with the questions and their answers")
    add_data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="the page to write (.html)")
    given = parser.parse_args(arguments)
    notices = Console(stderr=True)
    questions, root = read_questions(given, notices)
    columns = []
    with Progress(console=notices, transient=True) as progress:
        for name in given.models:
            task = progress.add_task(name, total=len(questions))
            seer = load_for_use(name)
            answers = ask(
                seer,
                questions,
                root,
                given.max_new_tokens,
                lambda count, task=task: progress.advance(task, count),
            )
            scored = [
                score(question.type, text, question.reference)
                for question, text in zip(questions, answers, strict=True)
            ]
            columns.append(Column(name=name, can_see=seer.can_see, answers=answers, summary=summarise(scored)))
            del seer
            gc.collect()
    title = f"{Path(given.data).name}: side by side"
    html = page(title, questions, columns, load_pictures(questions, root))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(html, encoding="utf-8")
    print(given.out)
    return 0
