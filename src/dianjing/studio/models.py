"""The models that can be asked from the page: loaded when first asked, one question at a time each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from dianjing.data.record import with_markers
from dianjing.errors import DataError

if TYPE_CHECKING:
    from dianjing.use.generate import Seer

MAX_NEW_TOKENS = 256


class _Model:
    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.stamp = 0
        self.seer: Seer | None = None


class Models:
    """Every model by the name that the page knows; a run is loaded anew when it has a newer checkpoint."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._models: dict[str, _Model] = {}
        self._lock = threading.Lock()

    def answer(
        self, path: str, image: Image | None, history: Sequence[tuple[str, str]], question: str
    ) -> Iterator[str]:
        """Yield first "" or a notice that the model cannot see, then the answer in pieces.

        The picture belongs to the first question. Another question to the same model waits until this one is answered.

        Raises:
            DianjingError: the model cannot be loaded, or the conversation is too long for it.
        """
        from dianjing.use.chat import BLIND
        from dianjing.use.generate import Conversation, prepare, stream

        model = self._known(path)
        with model.lock:
            seer = self._loaded(model)
            yield BLIND if image and not seer.can_see else ""
            asked = [text for text, _ in history] + [question]
            asked[0] = with_markers(asked[0], int(image is not None))
            past = [(text, answer) for text, (_, answer) in zip(asked, history, strict=False)]
            conversation = Conversation(past, asked[-1], [image] if image else [])
            try:
                prepare(seer, conversation)
            except ValueError as error:
                raise DataError(str(error)) from None
            for piece in stream(seer, conversation, MAX_NEW_TOKENS):
                yield piece
                if self.ending.is_set():
                    return

    def _known(self, path: str) -> _Model:
        with self._lock:
            return self._models.setdefault(path, _Model(path))

    def _loaded(self, model: _Model) -> Seer:
        """Return the model, read from disk if it is not in memory or a run has gone on since."""
        from dianjing.use.load import load_for_use  # slow to import: transformers

        stamp = _stamp(model.path)
        if model.seer is None or stamp != model.stamp:
            model.seer = None  # before the next one is loaded
            model.seer, model.stamp = load_for_use(model.path), stamp
        return model.seer


def _stamp(path: str) -> int:
    """Return when a run last got a checkpoint; 0 for what is no run."""
    return max((one.stat().st_mtime_ns for one in Path(path).glob("checkpoints/step-*")), default=0)
