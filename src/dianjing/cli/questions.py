"""What `eval` and `compare` share: the questions of a data file, checked before a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dianjing.data.record import load_records
from dianjing.errors import ConfigError
from dianjing.use.ask import check_pictures
from dianjing.use.generate import MAX_NEW_TOKENS
from dianjing.use.questions import Question, questions_of


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the pictures are and how much is asked."""
    parser.add_argument("--images", metavar="DIR", help="image folder (default: the folder of the data file)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="longest answer")


def read_questions(given: argparse.Namespace, notices: Console) -> tuple[list[Question], str]:
    """Return all questions of `given.data` and the image folder.

    Raises:
        DataError: a record or a picture cannot be used.
        ConfigError: --limit or --max-new-tokens is below 1.
    """
    if (given.limit is not None and given.limit < 1) or given.max_new_tokens < 1:
        raise ConfigError("--limit and --max-new-tokens must be at least 1")
    records = load_records(given.data)
    for notice, count in records.notices.items():
        notices.print(f"{given.data}: {notice} ({count} times)", style="yellow", markup=False)
    root = given.images or str(Path(given.data).parent)
    questions = [question for record in records.records[: given.limit] for question in questions_of(record)]
    check_pictures(questions, root)
    return questions, root
