"""Packs split in smaller ones, and the choice of activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from dianjing.data.pack import pack
from dianjing.errors import TrainError
from dianjing.model.stage import apply_stage
from dianjing.plan.lengths import lengths_of
from dianjing.plan.memory import CONTEXT_BYTES, memory
from dianjing.plan.weights import weights_of
from dianjing.train import memory as memory_module
from dianjing.train.memory import WithinMemory, plan_checkpointing, split
from tests.conftest import MakeRecipe
from tests.packs import prepare


@pytest.mark.parametrize("most", [1, 40, 60, 100, 1000])
def test_a_split_pack_is_what_the_data_set_makes_of_its_records(make_recipe: MakeRecipe, most: int) -> None:
    _, dataset = prepare(make_recipe("pretrain"))
    members = [1, 2, 4, 7, 0]
    whole = dataset.batch(members)
    parts = split(whole, most)
    lengths = [min(dataset.lengths[i], most) for i in members]
    expected = [[members[i] for i in group] for group in pack(lengths, most)] if most < whole.num_tokens else [members]
    assert len(parts) == len(expected)
    for part, group in zip(parts, expected, strict=True):
        for name, value in vars(dataset.batch(group)).items():
            found = getattr(part, name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
        assert part.num_tokens <= most or len(part.ids) == 1


class Gpu:
    """What is asked of an accelerator on a GPU."""

    device = torch.device("cuda")
    num_processes = 1


@pytest.mark.parametrize(("free", "on"), [(1.0, False), (0.99, True)])
def test_auto_looks_at_the_memory_that_is_free(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, free: float, on: bool
) -> None:
    recipe = make_recipe("finetune", language_model={"tuning": "lora"}, train={"precision": "bf16"})
    model, dataset = prepare(recipe)
    needed = memory(weights_of(model), recipe, lengths_of(dataset), checkpointing=False).total - CONTEXT_BYTES
    monkeypatch.setattr(memory_module, "_free_bytes", lambda _: int(needed * free))
    accelerator: Any = Gpu()
    found, why = plan_checkpointing(model, recipe, dataset, accelerator, compiled=True)
    assert found == on
    assert why.startswith(f"activation checkpointing: {'on' if on else 'off'}, 0.")
    assert ("without it" in why) == on
    assert all(
        getattr(layer, "gradient_checkpointing", False) == on for layer in model.model.language_model.layers[:-1]
    )


@pytest.mark.parametrize("said", ["auto", "on", "off"])
def test_on_a_cpu_auto_is_off(make_recipe: MakeRecipe, said: str) -> None:
    recipe = make_recipe("pretrain", train={"gradient_checkpointing": said})
    model, dataset = prepare(recipe)
    apply_stage(model, recipe)
    assert plan_checkpointing(model, recipe, dataset, Accelerator(cpu=True), compiled=False) == (said == "on", "")


@pytest.mark.parametrize(("ranks", "engine"), [(2, "ddp"), (1, "fsdp2")])
def test_ranks_that_share_a_step_do_not_take_it_again(make_recipe: MakeRecipe, ranks: int, engine: str) -> None:
    recipe = make_recipe("pretrain", train={"engine": engine})
    model, dataset = prepare(recipe)
    attempts: list[int] = []

    def attempt(packs: Any) -> list[float]:
        attempts.append(len(packs))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has little.")

    accelerator: Any = Gpu()
    accelerator.num_processes = ranks
    within = WithinMemory(model, recipe, accelerator, checkpointing=False, warn=print)
    with pytest.raises(TrainError, match=r"step 7: out of GPU memory .* cannot take a step again") as raised:
        within.run(7, [dataset.batch([0, 1])], attempt)
    assert 'set train.gradient_checkpointing = "on" or a smaller data.pack_tokens' in str(raised.value)
    assert attempts == [1]
