"""Questions of a data set -> answers, pictures loaded on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from PIL.Image import Image

from dianjing.errors import DataError
from dianjing.infer.generate import LoadedModel, continue_prompts, prompt_of, text_of
from dianjing.infer.pictures import PictureFiles, SeenPicture
from dianjing.infer.questions import Question
from dianjing.pictures.picture import check_image, load_image
from dianjing.pictures.rule import PictureRule
from dianjing.pictures.threads import on_all_cores

WINDOW = 512
"""Questions whose pictures are in memory at the same time."""
PROBLEMS_SHOWN = 20


def answer_questions(
    loaded: LoadedModel,
    questions: Sequence[Question],
    image_root: str,
    max_new_tokens: int,
    answered: Callable[[Question, str], object] = lambda question, answer: None,
    files: PictureFiles | None = None,
) -> list[str]:
    """Return one greedy answer for each question; `answered` gets each as soon as it is complete, in any order.

    `files` keeps pictures from one call to the next.
    """
    answers: list[str] = []
    for window, pictures in with_pictures(loaded, questions, image_root, files):
        prompts = [
            prompt_of(loaded, (), question.text, [pictures[name] for name in question.images if pictures])
            for question in window
        ]

        def finished(number: int, ids: list[int], window: Sequence[Question] = window) -> None:
            answered(window[number], text_of(loaded, ids))

        ids = continue_prompts(loaded, prompts, max_new_tokens, finished=finished)
        answers += [text_of(loaded, answer) for answer in ids]
    return answers


def with_pictures(
    loaded: LoadedModel, questions: Sequence[Question], image_root: str, files: PictureFiles | None = None
) -> Iterator[tuple[Sequence[Question], dict[str, SeenPicture]]]:
    """Yield some questions at a time, and their pictures by name; none for a model without eyes."""
    windows = [questions[start : start + WINDOW] for start in range(0, len(questions), WINDOW)]
    if not loaded.can_see:
        yield from ((window, {}) for window in windows)
        return
    files = files or PictureFiles(loaded)
    for number, window in enumerate(windows):
        pictures = files.look(image_root, _names(window))
        for following in windows[number + 1 : number + 2]:
            files.read_ahead(image_root, _names(following))
        yield window, pictures


def _names(questions: Sequence[Question]) -> list[str]:
    return [name for question in questions for name in question.images]


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
