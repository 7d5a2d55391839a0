"""Batches of questions: cut by memory, halved where it runs out, with the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dianjing.infer import generate as module
from dianjing.infer.generate import Conversation, generate_ids
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model


def test_a_batch_that_does_not_fit_is_halved(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = loaded_model(make_recipe("pretrain"))
    asked = [Conversation((), text, ()) for text in ("What is it?", "How many?", "Is it red or blue?")]
    expected = generate_ids(loaded, asked, 4)
    answers, sizes = module._answers, list[tuple[int, int]]()

    def out_of_memory(loaded: Any, prompts: Any, *rest: Any) -> Iterator[tuple[int, list[int]]]:
        sizes.append((len(prompts), at_once := rest[-1]))
        for number, answer in enumerate(answers(loaded, prompts, *rest)):
            if number and at_once > 1:
                raise torch.OutOfMemoryError
            yield answer

    monkeypatch.setattr(module, "_answers", out_of_memory)
    assert generate_ids(loaded, asked, 4) == expected
    assert sizes == [(3, 3), (2, 1)], "what was answered before is not asked again"
    assert "out of GPU memory with 3 questions at once" in capsys.readouterr().err


def test_one_question_that_does_not_fit_is_an_error(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Iterator[tuple[int, list[int]]]:
        raise torch.OutOfMemoryError
        yield 0, [0]

    monkeypatch.setattr(module, "_answers", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        generate_ids(loaded_model(make_recipe("pretrain")), [Conversation((), "What is it?", ())], 4)
