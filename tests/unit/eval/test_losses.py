from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from dianjing.constants import IGNORE_INDEX
from dianjing.errors import DataError
from dianjing.eval import losses as module
from dianjing.eval.losses import reference_losses
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question
from dianjing.pictures.picture import load_image
from tests.conftest import MakeRecipe
from tests.loaded_models import loaded_model, loaded_text_model
from tests.tiny import TinyDataset


def question(text: str, reference: str, *images: str) -> Question:
    return Question(id="r", turn=0, type="t", text="<image>\n" * len(images) + text, images=images, reference=reference)


QUESTIONS = [
    question("What colour is it?", "It is red.", "wide.png"),
    question("Hello!", "Good day to you, whoever you are."),
    question("Are they alike?", "No.", "tall.jpg", "square.png"),
    question("What colour is it?", "It is red.", "tall.jpg"),
]


@pytest.fixture
def loaded(make_recipe: MakeRecipe) -> LoadedModel:
    return loaded_model(make_recipe("finetune", language_model={"tuning": "lora", "lora_dropout": 0.5}))


def test_the_loss_is_that_of_transformers(loaded: LoadedModel, tiny_dataset: TinyDataset) -> None:
    ours = reference_losses(loaded, QUESTIONS, str(tiny_dataset.images))
    # The image token lies outside this vocabulary, which upstream cannot embed: give it a row.
    embedding = loaded.model.get_input_embeddings()
    embedding.weight.data = torch.cat([embedding.weight.data, torch.zeros(1, embedding.weight.shape[1])])
    for one, loss in zip(QUESTIONS, ours, strict=True):
        example = module._example(loaded, one, [])
        pixels = [loaded.processor(load_image(str(tiny_dataset.images), name)) for name in one.images]
        with torch.no_grad():
            logits = loaded.model(
                input_ids=torch.tensor([example.input_ids]),
                **({"pixel_values": torch.stack(pixels)} if pixels else {}),
            ).logits[0]
        theirs = cross_entropy(logits[:-1], torch.tensor(example.labels[1:]), ignore_index=IGNORE_INDEX)
        assert loss == pytest.approx(theirs.item(), rel=1e-4)
    assert len({round(loss, 4) for loss in ours}) == len(QUESTIONS), "they are too alike to show a mix-up"


def test_small_batches_equal_one_large(
    loaded: LoadedModel, tiny_dataset: TinyDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = reference_losses(loaded, QUESTIONS, str(tiny_dataset.images))
    monkeypatch.setattr(module, "CPU_POSITIONS", 60)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 2)
    monkeypatch.setattr("dianjing.infer.answers.WINDOW", 3)
    done: list[int] = []
    assert reference_losses(loaded, QUESTIONS, str(tiny_dataset.images), done.append) == pytest.approx(together)
    assert done == [3, 1]


def test_a_model_without_eyes_is_not_shown_the_picture(tiny_llm: Path) -> None:
    loaded = loaded_text_model(tiny_llm)
    blank = question("What colour is it?", "It is red.")
    red, same, none = reference_losses(loaded, [QUESTIONS[0], QUESTIONS[3], blank], "/")
    assert red == same == none


def test_more_than_the_model_reads_is_said(loaded: LoadedModel, tiny_dataset: TinyDataset) -> None:
    long = question("What?", "red " * loaded.model.config.get_text_config().max_position_embeddings, "wide.png")
    with pytest.raises(DataError, match=r'record "r": question 0 and its reference take \d+ positions'):
        reference_losses(loaded, [long], str(tiny_dataset.images))
