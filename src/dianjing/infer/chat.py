"""A conversation in the terminal: pictures, streamed answers, a few commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from dianjing.data.record import with_markers
from dianjing.errors import DataError
from dianjing.infer.generate import GREEDY, MAX_NEW_TOKENS, Conversation, LoadedModel, Sampling, stream
from dianjing.pictures.picture import load_image
from dianjing.pictures.rule import PictureRule

HELP = "/image PATH shows a picture with the next question, /reset starts over, /exit ends."
BLIND = "it cannot see: a text-only model, so pictures are not shown to it"


@dataclass(kw_only=True)
class Session:
    """A conversation so far, with the pictures that wait for the next question."""

    loaded: LoadedModel
    first_images: Sequence[Image] = ()
    """Shown with the first question, and again with the first one after a reset."""
    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = GREEDY
    history: list[tuple[str, str]] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    """All pictures shown so far, in the order of their markers."""
    waiting: list[Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the pictures that the session began with."""
        self.history, self.images, self.waiting = [], [], list(self.first_images)

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces; a question whose answer is cut off by the caller is forgotten."""
        question = with_markers(text, len(self.waiting))
        images = [*self.images, *self.waiting]
        answer = ""
        conversation = Conversation(self.history, question, images)
        for piece in stream(self.loaded, conversation, self.max_new_tokens, self.sampling):
            answer += piece
            yield piece
        self.history.append((question, answer))
        self.images, self.waiting = images, []


def open_picture(path: str, rule: PictureRule) -> Image:
    """Return the picture at a path that the user gave.

    Raises:
        DataError: it is missing, broken, no picture, or an address.
    """
    if "://" in path:
        raise DataError(f"picture {path}: addresses are not opened; save the picture and give its path")
    resolved = Path(path).expanduser().resolve()
    if not resolved.exists():
        raise DataError(f"picture {path}: there is no such file")
    return load_image(str(resolved.parent), resolved.name, rule)


def chat(session: Session, read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Talk until /exit or the end of the input; an error of one line does not end the conversation."""
    write(f"{session.loaded.name}" + ("" if session.loaded.can_see else f" ({BLIND})") + f"\n{HELP}\n")
    while True:
        try:
            line = read().strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        if line in ("/exit", "/quit"):
            return
        try:
            _answer(session, line, write)
        except KeyboardInterrupt:
            write("\n(stopped; the question is forgotten)\n")
        except DataError as error:
            write(f"{error}\n")


def _answer(session: Session, line: str, write: Callable[[str], object]) -> None:
    if line == "/reset":
        session.reset()
        write("(a new conversation)\n")
    elif line.startswith("/image "):
        session.waiting.append(open_picture(line.removeprefix("/image ").strip(), session.loaded.picture_rule))
        write("(shown with your next question)\n")
    elif line.startswith("/"):
        write(f"{HELP}\n")
    elif line:
        for piece in session.ask(line):
            write(piece)
        write("\n")
