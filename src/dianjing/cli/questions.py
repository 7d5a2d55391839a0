"""The questions of a data file, checked before a model is loaded: what `eval` and `compare` ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dianjing.cli.flags import Asking
from dianjing.data.record import load_records
from dianjing.errors import ConfigError
from dianjing.infer.answers import check_pictures
from dianjing.infer.load import picture_rule
from dianjing.infer.questions import Question, questions_of


def read_questions(data: str, given: Asking, models: Sequence[str], notices: Console) -> tuple[list[Question], str]:
    """Return all questions of a data file, which `models` are to answer, and its image folder.

    Raises:
        DataError: a record or a picture cannot be used.
        ConfigError: --limit or --max-new-tokens is too small.
    """
    if given.limit < 0 or given.max_new_tokens < 1:
        raise ConfigError("--limit must be at least 0 and --max-new-tokens at least 1")
    found = load_records(data)
    for notice, count in found.notices.items():
        notices.print(f"{data}: {notice} ({count} times)", style="yellow", markup=False, soft_wrap=True)
    root = given.images or str(Path(data).parent)
    questions = [question for record in found.records[: given.limit or None] for question in questions_of(record)]
    for rule in {picture_rule(model) for model in models}:
        check_pictures(questions, root, rule)
    return questions, root
