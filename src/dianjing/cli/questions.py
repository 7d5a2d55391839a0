"""The questions of a data file, checked before a model is loaded: what `eval` and `compare` ask."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dianjing.cli.flags import Asking
from dianjing.console import Console
from dianjing.data.record import FEW_PICTURES, load_records
from dianjing.errors import ConfigError
from dianjing.infer.answers import check_pictures
from dianjing.infer.load import picture_rule
from dianjing.infer.questions import Question, questions_of
from dianjing.language import say
from dianjing.pictures.picture import check_image
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import allowed_pairs, sample_scene

DRAWN = "drawn.png"
"""The picture that is shown where the data have no other one and none is named."""
SEED = 18


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


@contextmanager
def foreign_picture(given: Asking, models: Sequence[str]) -> Iterator[Path]:
    """Give the picture of --other, or one that is drawn, for questions without another picture in the data.

    Raises:
        DataError: the picture of --other cannot be used.
    """
    if given.other:
        file = Path(given.other).expanduser()
        for rule in {picture_rule(model) for model in models}:
            check_image(str(file.parent), file.name, rule)
        yield file
        return
    with TemporaryDirectory(prefix="dianjing-") as folder:
        file = Path(folder) / DRAWN
        render(sample_scene(random.Random(SEED), allowed_pairs("train")), SEED).save(file)
        yield file


def say_pictures(questions: Sequence[Question], shown: int, given: Asking, notices: Console) -> None:
    """Print that the pictures are few, how many questions were shown one from outside, and what --other did."""
    pictures = {name for question in questions for name in question.images}
    if 1 < len(pictures) < FEW_PICTURES:
        text = say(
            "only {number} pictures: the intervals tell how these agree, not what others would give",
            number=len(pictures),
        )
        notices.print(text, style="yellow", markup=False, soft_wrap=True)
    if shown:
        name = given.other or say("a drawn picture (--other FILE names one of yours)")
        text = say(
            "{number} questions have no other picture in the data; their other picture is {name}",
            number=shown,
            name=name,
        )
        notices.print(text, style="yellow", markup=False, soft_wrap=True)
    elif given.other:
        text = say("--other {file} was not shown: the data have another picture for every question", file=given.other)
        notices.print(text, style="yellow", markup=False, soft_wrap=True)
