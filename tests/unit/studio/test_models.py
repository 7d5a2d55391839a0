"""Models are loaded once, one at a time, and while nobody answers; a run with a newer checkpoint is loaded anew."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dianjing.errors import DataError, ModelError
from dianjing.infer import generate, load
from dianjing.infer.chat import BLIND
from dianjing.infer.generate import Conversation
from dianjing.studio.models import Models
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, loaded_text_model, picture, write_run


def test_an_answer_is_what_chat_would_say(make_recipe: MakeRecipe, tiny_llm: Path) -> None:
    recipe = make_recipe()
    run = str(write_run(recipe, loaded_model(recipe)))
    loaded, image = load.load_for_use(run), picture(60, 20, 1)
    history = [("What is it?", "Red.")]
    expected = generate.generate(loaded, [Conversation([("<image>\nWhat is it?", "Red.")], "Sure?", [image])])[0]
    models = Models()
    notice, *pieces = models.answer(run, image, history, "Sure?")
    assert (notice, "".join(pieces)) == ("", expected)
    blind, *pieces = models.answer(str(tiny_llm), image, (), "Hello!")
    assert blind == BLIND
    assert "".join(pieces) == generate.generate(loaded_text_model(tiny_llm), [Conversation((), "Hello!", [])])[0]


def test_what_cannot_be_asked_is_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    run = str(write_run(recipe, loaded_model(recipe)))
    with pytest.raises(DataError, match="1 <image> markers but 0 pictures"):
        list(Models().answer(run, None, (), "<image> What?"))
    with pytest.raises(ModelError):
        list(Models().answer(str(tmp_path / "none"), None, (), "?"))


class Loading:
    """Stands for loading and answering; counts what happens at the same time."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.going = 0
        self.most = 0
        self.lock = threading.Lock()

    def enter(self, by: int) -> None:
        with self.lock:
            self.going += by
            self.most = max(self.most, self.going)

    def load(self, path: str) -> Any:
        self.enter(1)
        self.loads.append(path)
        threading.Event().wait(0.02)
        self.enter(-1)
        return type("LoadedModel", (), {"can_see": True, "name": path})()

    def stream(self, *_: Any) -> Iterator[str]:
        yield "a"


def test_models_are_loaded_one_at_a_time_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = Loading()
    monkeypatch.setattr(load, "load_for_use", loading.load)
    monkeypatch.setattr(generate, "stream", loading.stream)
    monkeypatch.setattr(generate, "prepare", lambda *_: None)
    models = Models()
    threads = [threading.Thread(target=lambda i=i: list(models.answer(f"m{i % 3}", None, (), "?"))) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loading.loads) == ["m0", "m1", "m2"]
    assert loading.most == 1


def test_a_newer_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loading = Loading()
    monkeypatch.setattr(load, "load_for_use", loading.load)
    monkeypatch.setattr(generate, "stream", loading.stream)
    monkeypatch.setattr(generate, "prepare", lambda *_: None)
    models, first = Models(), tmp_path / "checkpoints" / "step-000001"
    first.mkdir(parents=True)
    for _ in range(2):
        list(models.answer(str(tmp_path), Image.new("RGB", (4, 4)), (), "?"))
    assert len(loading.loads) == 1
    second = tmp_path / "checkpoints" / "step-000002"
    second.mkdir()
    os.utime(second, ns=(first.stat().st_mtime_ns + 10**9,) * 2)
    list(models.answer(str(tmp_path), None, (), "?"))
    assert len(loading.loads) == 2
