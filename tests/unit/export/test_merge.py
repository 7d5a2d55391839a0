from __future__ import annotations

import torch

from dianjing.export.merge import merged_state
from dianjing.infer.answering import answering
from dianjing.infer.generate import pack, prepare
from dianjing.model.build import build
from dianjing.model.forward import language_parts
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model

LORA = {
    "language_model": {"tuning": "lora", "lora_head": True},
    "vision_tower": {"tuning": "lora"},
}


def test_merged_equals_adapters(make_recipe: MakeRecipe) -> None:
    """And the adapters do something: without them the logits are others."""
    recipe = make_recipe("finetune", **LORA)
    adapted, plain = loaded_model(recipe), build(recipe).model.eval()
    merged = build(recipe).model.eval()
    merged.load_state_dict(merged_state(adapted.model))
    plain.model.multi_modal_projector = adapted.model.model.multi_modal_projector
    found = []
    for model in (adapted.model, merged, plain):
        decoder, head = language_parts(model)
        object.__setattr__(adapted, "model", model)
        with answering(model):
            embeddings = pack(adapted, [prepare(adapted, conversations()[0])]).embeddings[None]
            found.append(head(decoder(inputs_embeds=embeddings).last_hidden_state))
    assert (found[0] - found[1]).abs().max() < 1e-5
    assert (found[0] - found[2]).abs().max() > 1e-2


def test_merging_leaves_the_model_alone(make_recipe: MakeRecipe) -> None:
    model = loaded_model(make_recipe("finetune", **LORA)).model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = merged_state(model)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any("lora" in name or "base_layer" in name for name in state)
    assert set(state) == set(build(make_recipe("finetune")).model.state_dict())


def test_shared_qkv_adapters_are_merged_into_each(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("finetune", language_model={"tuning": "lora", "lora_share_qkv": True})
    model, before = loaded_model(recipe).model, build(recipe).model.state_dict()
    state = merged_state(model)
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"model.language_model.layers.0.self_attn.{name}.weight"
        assert not torch.equal(state[key], before[key])
