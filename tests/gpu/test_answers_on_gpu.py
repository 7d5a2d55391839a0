"""Answers written on a GPU: replayed steps against the steps themselves, with each kind of frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dianjing.infer.generate import LoadedModel, continue_prompts, generate_ids, prepare, stream
from dianjing.layers import attention
from dianjing.model.build import build
from dianjing.model.compile import fuse_layers
from dianjing.model.stage import apply_stage
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations
from tests.tiny import gentle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: replayed steps are not tested"),
    pytest.mark.filterwarnings("ignore"),  # torch warns of itself
]
TOKENS = 24


@pytest.fixture(params=["", "fp8", "fused", "fused fp8"])
def loaded(
    request: pytest.FixtureRequest, make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    frozen = request.param.removeprefix("fused").strip()
    recipe = make_recipe(
        "finetune", **gentle(tmp_path_factory.mktemp("gentle"), frozen, {"tuning": "lora", "lora_rank": 8})
    )
    built = build(recipe, "cuda")
    apply_stage(built.model, recipe)
    if "fused" in request.param:
        fuse_layers(built.model)
    return LoadedModel(
        name="tiny",
        model=built.model.eval(),
        tokenizer=built.tokenizer,
        encoder=built.encoder,
        image_processor=built.image_processor,
        recipe=recipe,
    )


def test_replayed_steps_are_the_steps(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = generate_ids(loaded, conversations() * 4, TOKENS)
    monkeypatch.setattr("dianjing.infer.slots._Graphs.__call__", lambda self, rows, reach: self._run(rows, reach))
    assert generate_ids(loaded, conversations() * 4, TOKENS) == replayed
    assert len({tuple(answer) for answer in replayed}) > 3, "the answers are too alike to show a mix-up"


def test_slots_that_are_filled_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows a step, so that products round alike; answers of several lengths."""
    prompts = [prepare(loaded, one) for one in conversations() * 3]
    order: list[int] = []
    monkeypatch.setattr("dianjing.infer.generate.AT_ONCE", 4)
    answers = continue_prompts(loaded, prompts, TOKENS, finished=lambda number, ids: order.append(number))
    assert sorted(order) == list(range(len(prompts)))
    size = len(conversations())
    alike = [answers[i] == answers[i + size] for i in range(size)]
    assert sum(alike) >= size - 1, "the same prompt, the same answer, wherever it stands"


def test_streamed_pieces_are_the_answer(loaded: LoadedModel) -> None:
    one = conversations()[0]
    assert "".join(stream(loaded, one, TOKENS))


def test_cached_attention_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, 8, 1, 64, device="cuda").bfloat16()
    key, value = torch.randn(2, 3, 2, 128, 64, device="cuda").bfloat16()
    positions = torch.tensor([5, 127, 40], device="cuda")
    for window in (None, 16):
        found = attention.cached_attention(query, key, value, positions, None, window)
        for row, last in enumerate(positions.tolist()):
            first = max(0, last - window + 1) if window else 0
            seen = slice(first, last + 1)
            expected: Any = torch.nn.functional.scaled_dot_product_attention(
                query[row : row + 1].float(),
                key[row : row + 1, :, seen].float(),
                value[row : row + 1, :, seen].float(),
                enable_gqa=True,
            )
            assert (found[row, 0] - expected[0, :, 0]).abs().max() < 0.01


def test_sampling_of_a_replayed_step_differs_by_seed(loaded: LoadedModel) -> None:
    from dianjing.infer.generate import Sampling

    hot = Sampling(temperature=2.0)
    drawn = [generate_ids(loaded, conversations()[:1], TOKENS, replace(hot, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
