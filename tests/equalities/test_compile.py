"""Compiled layers are the layers: traced for real, but run without the compiler's back end, which takes minutes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dianjing.model.compile import compile_layers, uncompiled
from dianjing.model.forward import num_tower_layers
from tests.conftest import MakeRecipe
from tests.packs import assert_same, outcome, prepare


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Module.compile

    def without_back_end(self: nn.Module, **settings: Any) -> None:
        plain(self, backend="aot_eager", dynamic=settings["dynamic"])

    monkeypatch.setattr(nn.Module, "compile", without_back_end)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": "on"}, {"precision": "bf16"}])
def test_compiled_layers_are_the_layers(make_recipe: MakeRecipe, traced: None, train: dict[str, Any]) -> None:
    settings = {"tuning": "lora"}
    recipe = make_recipe("finetune", language_model=settings, vision_tower=settings, train=train)
    plain, dataset = prepare(recipe)
    compiled, _ = prepare(recipe)
    compile_layers(layers_of(compiled))
    for records in ([0, 1, 3], [2, 7]):
        batch = dataset.batch(records)
        assert_same(outcome(compiled, [batch]), outcome(plain, [batch]))


@pytest.mark.filterwarnings("ignore")
def test_answers_are_not_compiled(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model, dataset = prepare(make_recipe("pretrain"))
    compiled: list[Any] = []

    def back_end(graph: Any, _inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    plain = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: plain(self, backend=back_end))
    torch._dynamo.reset()
    compile_layers(layers_of(model))
    with uncompiled(model), torch.no_grad():
        expected = outcome_of(model, dataset)
    assert not compiled
    with torch.no_grad():
        assert outcome_of(model, dataset) == pytest.approx(expected, rel=1e-5)
    assert compiled


def layers_of(model: Any) -> list[nn.Module]:
    tower = model.model.vision_tower
    return [*tower.encoder.layers[: num_tower_layers(model)], *model.model.language_model.layers]


def outcome_of(model: Any, dataset: Any) -> float:
    from dianjing.model.forward import forward_loss

    return forward_loss(model, dataset.batch([0, 1])).item()
