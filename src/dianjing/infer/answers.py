"""Questions of a data set -> answers, pictures loaded on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL.Image import Image

from dianjing.errors import DataError
from dianjing.infer.generate import Conversation, LoadedModel, generate
from dianjing.infer.questions import Question
from dianjing.pictures.picture import check_image, load_image
from dianjing.pictures.rule import PictureRule
from dianjing.pictures.threads import on_all_cores

WINDOW = 256
"""Questions whose pictures are in memory at the same time."""
PROBLEMS_SHOWN = 20


def answer_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Return one greedy answer for each question; `advance` gets the number answered since its last call."""
    answers: list[str] = []
    for start in range(0, len(questions), WINDOW):
        window = questions[start : start + WINDOW]
        pictures = load_pictures(window, image_root, loaded.picture_rule) if loaded.can_see else {}
        conversations = [
            Conversation((), question.text, [pictures[name] for name in question.images if pictures])
            for question in window
        ]
        answers += generate(loaded, conversations, max_new_tokens)
        advance(len(window))
    return answers


def load_pictures(questions: Sequence[Question], image_root: str, rule: PictureRule) -> dict[str, Image]:
    """Return the pictures of the questions by name, each loaded once."""
    names = dict.fromkeys(name for question in questions for name in question.images)
    images = on_all_cores(lambda name: load_image(image_root, name, rule), names)
    return dict(zip(names, images, strict=True))


def check_pictures(questions: Sequence[Question], image_root: str, rule: PictureRule) -> None:
    """Check every picture before the first question is asked.

    Raises:
        DataError: some pictures cannot be used; one error names them all, with the records that show them.
    """
    first_user = {name: question.id for question in reversed(questions) for name in question.images}
    problems = []
    for name, record in first_user.items():
        try:
            check_image(image_root, name, rule)
        except DataError as error:
            problems.append(f'record "{record}": {error}')
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        lines = [*problems[:PROBLEMS_SHOWN], *more]
        raise DataError("\n  ".join([f"{len(problems)} pictures cannot be used:", *lines]))
