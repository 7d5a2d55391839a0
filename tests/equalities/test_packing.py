"""Records in one pack are what they are alone, and what transformers' own LLaVA makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dianjing.model.forward import forward_loss
from tests.conftest import MakeRecipe
from tests.packs import assert_same, outcome, prepare, upstream
from tests.tiny import write_llm

EVERYTHING = {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}}
ADAPTERS = {"language_model": {"tuning": "lora", "lora_head": True}, "vision_tower": {"tuning": "lora"}}

every_tuning = pytest.mark.parametrize(
    ("stage", "tuning"),
    [
        pytest.param("pretrain", {}, id="projector"),
        pytest.param("finetune", ADAPTERS, id="lora"),
        pytest.param("finetune", EVERYTHING, id="full"),
        pytest.param("finetune", {"language_model": {"tuning": "full"}}, id="language model"),
    ],
)


@every_tuning
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_is_its_records_one_by_one(
    make_recipe: MakeRecipe, stage: str, tuning: dict[str, Any], checkpointing: bool
) -> None:
    recipe = make_recipe(stage, train={"gradient_checkpointing": "on" if checkpointing else "off"}, **tuning)
    model, dataset = prepare(recipe)
    everything = range(dataset.num_records)
    alone = outcome(model, [dataset.batch([index]) for index in everything])
    assert_same(outcome(model, [dataset.batch(everything)]), alone)
    assert_same(outcome(model, [dataset.batch([6, 2, 4]), dataset.batch([0, 7, 1, 5, 3])]), alone)


@every_tuning
def test_a_pack_is_what_upstream_computes(make_recipe: MakeRecipe, stage: str, tuning: dict[str, Any]) -> None:
    model, dataset = prepare(make_recipe(stage, **tuning))
    batch = dataset.batch(range(dataset.num_records))
    assert_same(outcome(model, [batch]), upstream(model, batch))


def test_gradient_checkpointing_changes_no_bit(make_recipe: MakeRecipe) -> None:
    outcomes = []
    for checkpointing in (False, True):
        model, dataset = prepare(
            make_recipe("finetune", train={"gradient_checkpointing": "on" if checkpointing else "off"}, **ADAPTERS)
        )
        outcomes.append(outcome(model, [dataset.batch(range(dataset.num_records))]))
    (loss, gradients), (loss_again, gradients_again) = outcomes
    assert loss == loss_again
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("fault", ["one span over two records", "positions run on", "pictures change places"])
def test_a_leak_is_seen(make_recipe: MakeRecipe, fault: str) -> None:
    model, dataset = prepare(make_recipe("finetune", **ADAPTERS))
    records = [0, 1, 3]
    alone = outcome(model, [dataset.batch([index]) for index in records])
    batch = dataset.batch(records)
    assert_same(outcome(model, [batch]), alone)
    leaking = {
        "one span over two records": {"cu_seqlens": batch.cu_seqlens[[0, 2, 3]]},
        "positions run on": {"position_ids": torch.arange(batch.num_tokens)},
        "pictures change places": {"pixels": batch.pixels.flip(0)},
    }[fault]
    with pytest.raises(AssertionError):
        assert_same(outcome(model, [replace(batch, **leaking)]), alone)


def test_a_pack_without_pictures_gives_the_eyes_a_zero_gradient(make_recipe: MakeRecipe) -> None:
    """Every rank of a distributed run must have a gradient for every parameter that trains."""
    model, dataset = prepare(make_recipe("finetune", **ADAPTERS))
    _, gradients = outcome(model, [dataset.batch([2, 7])])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert gradients.keys() == trained
    for name, gradient in gradients.items():
        sees = "vision_tower" in name or "projector" in name
        assert (gradient == 0).all() == sees, name


@pytest.mark.parametrize("records", [[2, 7], [0, 2]], ids=["no picture", "a picture"])
def test_the_loss_without_gradients_is_the_same(make_recipe: MakeRecipe, records: list[int]) -> None:
    model, dataset = prepare(make_recipe("finetune", **ADAPTERS))
    batch = dataset.batch(records)
    with torch.no_grad():
        loss = forward_loss(model, batch)
    assert loss.item() == pytest.approx(outcome(model, [batch])[0].item(), rel=1e-6)


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_tied_embeddings_stay_tied(make_recipe: MakeRecipe, tmp_path: Any, tuning: str) -> None:
    folder = write_llm(tmp_path, tie_word_embeddings=True)
    stage = "pretrain" if tuning == "frozen" else "finetune"
    model, dataset = prepare(make_recipe(stage, language_model={"folder": str(folder), "tuning": tuning}))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    batch = dataset.batch(range(dataset.num_records))
    assert_same(outcome(model, [batch]), upstream(model, batch))
