"""The models that can be asked from the page: loaded when first asked, one question at a time each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from dianjing.data.record import with_markers
from dianjing.errors import DataError
from dianjing.run.layout import checkpoints

if TYPE_CHECKING:
    from dianjing.infer.generate import LoadedModel

MAX_NEW_TOKENS = 256


class _Model:
    def __init__(self, path: str) -> None:
        self.path = path
        self.lock = threading.Lock()
        """Held while it answers."""
        self.stamp = 0
        self.loaded: LoadedModel | None = None


class Models:
    """Every model by its path; a run is loaded again when it has a newer checkpoint."""

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._models: dict[str, _Model] = {}
        self._loading = threading.Lock()

    def answer(
        self, path: str, image: Image | None, history: Sequence[tuple[str, str]], question: str
    ) -> Iterator[str]:
        """Yield first "" or a notice that the model cannot see, then the answer in pieces.

        The picture belongs to the first question. Another question to the same model waits until this one is answered.

        Raises:
            DianjingError: the model cannot be loaded, or the conversation is too long for it.
        """
        from dianjing.infer.chat import BLIND
        from dianjing.infer.generate import Conversation, prepare, stream

        lock, loaded = self._loaded(path)
        with lock:
            yield BLIND if image and not loaded.can_see else ""
            asked = [text for text, _ in history] + [question]
            asked[0] = with_markers(asked[0], int(image is not None))
            past = [(text, answer) for text, (_, answer) in zip(asked, history, strict=False)]
            conversation = Conversation(past, asked[-1], [image] if image else [])
            try:
                prepare(loaded, conversation)
            except ValueError as error:
                raise DataError(str(error)) from None
            for piece in stream(loaded, conversation, MAX_NEW_TOKENS):
                yield piece
                if self.ending.is_set():
                    return

    def _loaded(self, path: str) -> tuple[threading.Lock, LoadedModel]:
        """Return the model, read from disk if it is not in memory or a run has gone on since.

        While one is read, none answers and no other is read: transformers changes defaults of the whole process.
        """
        from dianjing.infer.load import load_for_use  # slow to import: transformers

        with self._loading:
            model, stamp = self._models.setdefault(path, _Model(path)), _stamp(path)
            if model.loaded is None or stamp != model.stamp:
                with ExitStack() as held:
                    for other in self._models.values():
                        held.enter_context(other.lock)
                    model.loaded = None  # before the next one is in memory
                    model.loaded, model.stamp = load_for_use(path), stamp
            return model.lock, model.loaded


def _stamp(path: str) -> int:
    """Return when a run last got a checkpoint; 0 if it has none."""
    return max((one.stat().st_mtime_ns for one in checkpoints(Path(path))), default=0)
