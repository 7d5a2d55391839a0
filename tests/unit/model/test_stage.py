"""What trains in a stage, what the loss can reach, and what the report says of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import nn

from dianjing.model.build import build
from dianjing.model.forward import forward_loss, num_tower_layers
from dianjing.model.stage import apply_stage, in_units, part_of
from dianjing.model.weights import trainable_state
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare

LLM_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOWER_LINEAR = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def staged(make_recipe: MakeRecipe, stage: str = "finetune", **sections: Any) -> Any:
    recipe = make_recipe(stage, **sections)
    model = build(recipe).model
    return model, apply_stage(model, recipe)


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def test_pretrain_trains_the_projector_alone(make_recipe: MakeRecipe) -> None:
    model, report = staged(make_recipe, "pretrain")
    names = ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"]
    assert list(trainable_state(model)) == [f"model.multi_modal_projector.{name}" for name in names]
    assert [row.trainable for row in report.parts] == [0, 0, 24 * 32 + 32 + 32 * 32 + 32]


def test_lora_stands_on_all_linears_of_the_llm_but_the_head(make_recipe: MakeRecipe) -> None:
    model, _ = staged(make_recipe, language_model={"tuning": "lora"})
    names = adapted(model)
    assert len(names) == 2 * len(LLM_LINEAR)
    assert {name.split(".")[-1] for name in names} == LLM_LINEAR
    assert all(name.startswith("model.language_model.layers.") for name in names)
    trained = trainable_state(model)
    assert {part_of(name) for name in trained} == {"language_model", "projector"}
    assert all("lora_" in name for name in trained if part_of(name) == "language_model")


def test_lora_on_the_head(make_recipe: MakeRecipe) -> None:
    model, _ = staged(make_recipe, language_model={"tuning": "lora", "lora_head": True})
    assert "lm_head" in adapted(model)


@pytest.mark.parametrize(("feature_layer", "layers"), [(-2, 2), (-1, 3), (1, 1), (-3, 1)])
def test_lora_stands_on_the_tower_layers_that_reach_the_loss(
    make_recipe: MakeRecipe, feature_layer: int, layers: int
) -> None:
    model, _ = staged(make_recipe, vision_tower={"tuning": "lora", "feature_layer": feature_layer})
    names = adapted(model)
    assert {name.split(".")[-1] for name in names} == TOWER_LINEAR
    assert {int(name.split(".")[4]) for name in names} == set(range(layers))


def test_a_shared_down_projection_is_one_parameter(make_recipe: MakeRecipe) -> None:
    settings = {"tuning": "lora", "lora_share_qkv": True}
    model, _ = staged(make_recipe, language_model=settings)
    down = [name for name in trainable_state(model) if "self_attn" in name and "lora_A" in name]
    assert [name.split(".")[-4] for name in down] == ["q_proj", "o_proj"] * 2
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"].weight is attention.v_proj.lora_A["default"].weight


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_everything_that_trains_moves_the_loss_and_the_dead_layers_do_not(make_recipe: MakeRecipe, tuning: str) -> None:
    model, dataset = prepare(
        make_recipe("finetune", language_model={"tuning": tuning}, vision_tower={"tuning": tuning})
    )
    batch = dataset.batch(range(dataset.num_records))
    loss, gradients = outcome(model, [batch])
    trained = trainable_state(model)
    assert gradients.keys() == trained.keys()
    assert all(gradient.any() for gradient in gradients.values())
    dead = [f"encoder.layers.{number}." for number in range(num_tower_layers(model), 3)] + ["post_layernorm."]
    assert dead == ["encoder.layers.2.", "post_layernorm."]
    for name, weight in model.model.vision_tower.named_parameters():
        if name.startswith(tuple(dead)):
            assert not weight.requires_grad, name
            torch.nn.init.constant_(weight.data, torch.nan)
    assert forward_loss(model, batch) == loss


def test_full_tuning_trains_the_llm_and_its_head(make_recipe: MakeRecipe) -> None:
    model, report = staged(make_recipe, language_model={"tuning": "full"})
    frozen = {part_of(name) for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {"vision_tower"}
    assert model.lm_head.weight.requires_grad
    assert report.parts[0].parameters == report.parts[0].trainable > 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_trains_is_fp32_and_the_rest_is_as_it_was(make_recipe: MakeRecipe, tuning: str) -> None:
    model, report = staged(make_recipe, train={"precision": "bf16"}, language_model={"tuning": tuning})
    for name, weight in model.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16), name
    assert report.parts[1].dtype == "bf16"


def test_bf16_is_near_fp32(make_recipe: MakeRecipe) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        model, dataset = prepare(
            make_recipe("finetune", train={"precision": precision}, language_model={"tuning": "lora"})
        )
        losses.append(outcome(model, [dataset.batch(range(dataset.num_records))])[0])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0].item(), rel=0.02)


def test_the_report_names_each_part_and_its_rate(make_recipe: MakeRecipe) -> None:
    _, report = staged(
        make_recipe,
        train={"learning_rate": 3e-4},
        language_model={"tuning": "lora", "learning_rate": 2e-5},
        vision_tower={"tuning": "frozen"},
    )
    assert [row.learning_rate for row in report.parts] == [2e-5, None, 3e-4]
    assert [row.tuning for row in report.parts] == ["lora", "frozen", "full"]
    console = Console(width=120, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert all(word in text for word in ("language model", "vision tower", "projector", "2e-05", "0.0003"))
    assert f"{report.trainable:,}" in text
    assert in_units(sum(row.num_bytes for row in report.parts)) in text


@pytest.mark.parametrize("tuning", ["frozen", "lora", "full"])
def test_memory_is_that_of_the_weights(make_recipe: MakeRecipe, tuning: str) -> None:
    model, report = staged(
        make_recipe, train={"precision": "bf16"}, language_model={"tuning": tuning}, vision_tower={"tuning": tuning}
    )
    own = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
    assert sum(row.num_bytes for row in report.parts) == own
    assert in_units(3 * 2**20) == "3.0 MiB"
    assert in_units(3 * 2**30) == "3.0 GiB"


def test_new_weights_are_the_seeds_and_leave_other_random_numbers_alone(make_recipe: MakeRecipe) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (
        trainable_state(staged(make_recipe, seed=seed, language_model={"tuning": "lora"})[0]) for seed in (3, 3, 4)
    )
    assert torch.rand(1) == expected
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_B" not in name)
