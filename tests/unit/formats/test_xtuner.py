"""XTuner's names and numbers of parameters <-> ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.pickle import read_checkpoint
from dianjing.formats.xtuner import from_live, live_parts, moments_by_name, parameters_in_order, to_live
from tests.xtuner import XTUNER

LLAMA: Any = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2})
LORA = "llm.base_model.model.model.layers.0.attention.wqkv"
TOWER = "visual_encoder.base_model.model.vision_model.encoder.layers"


def real(stage: str) -> dict[str, Any]:
    return read_checkpoint(XTUNER / "tiny" / f"{stage}_iter_10.pth")


def test_q_k_and_v_are_the_rows_of_their_groups() -> None:
    rows = torch.arange(8.0).repeat_interleave(3)[:, None].expand(24, 2)  # q0 q1 k0 v0 q2 q3 k1 v1, three rows each
    found = live_parts(f"{LORA}.lora_B.default.weight", rows, LLAMA)
    heads = {name.split(".")[5]: sorted(set(weight[:, 0].tolist())) for name, weight in found.items()}
    assert heads == {"q_proj": [0, 1, 4, 5], "k_proj": [2, 6], "v_proj": [3, 7]}
    shared = torch.ones(2, 6)
    assert list(live_parts(f"{LORA}.lora_A.default.weight", shared, LLAMA)) == [
        "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    ]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_there_and_back_is_the_file_but_for_the_layer_that_reaches_nothing(stage: str) -> None:
    stored: dict[str, Tensor] = real(stage)["state_dict"]
    found = to_live(stored, LLAMA, tower_layers=2)
    assert not found.unknown
    dropped = {name for names in found.dropped.values() for name in names}
    assert dropped == {name for name in stored if ".layers.2." in name}
    back = from_live(found.live, LLAMA, internlm2=True)
    assert back.keys() == stored.keys() - dropped
    assert all(torch.equal(back[name], stored[name]) for name in back)


def test_names_of_no_part_are_unknown() -> None:
    weights = {
        "llm.transformer.h.0.weight": torch.ones(1),
        "optimizer.x": torch.ones(1),
        "projector.model.4.weight": torch.ones(1),
    }
    assert to_live(weights, LLAMA, 2).unknown == list(weights)


def test_real_moments_are_those_of_the_weights_with_a_gradient() -> None:
    content = real("finetune")
    found = moments_by_name(content["optimizer"], content["state_dict"], "x")
    assert found.keys() == {
        name for name in content["state_dict"] if ".layers.2." not in name or name.startswith("llm.")
    }
    for name, moments in found.items():
        assert moments["exp_avg"].shape == content["state_dict"][name].shape
        assert moments["step"] == 10
    # Each lora_B began at zero and went against its gradients; with moments of another weight half the signs would fit.
    bs = [name for name in found if ".lora_B." in name]
    agreeing = [(content["state_dict"][name].sign() == -found[name]["exp_avg"].sign()).float().mean() for name in bs]
    assert torch.stack(agreeing).mean() > 0.75


def optimizer(*shapes: tuple[int, ...] | None) -> dict[str, Any]:
    """Return AdamW's state of parameters in order, None for one without gradient."""
    state = {
        2 * number + 1: {"step": 3, "exp_avg": torch.full(shape, float(number)), "exp_avg_sq": torch.ones(shape)}
        for number, shape in enumerate(shapes)
        if shape
    }
    return {"state": state, "param_groups": [{"params": list(range(2 * len(shapes) + 1))}]}


def test_moments_are_told_by_the_order_of_the_models_parameters_not_of_the_file() -> None:
    lora = f"{TOWER}.0.mlp.fc1.lora_A.default.weight"
    dead = f"{TOWER}.1.mlp.fc1.lora_A.default.weight"
    weights = {
        "projector.model.0.weight": torch.zeros(2, 2),
        lora: torch.zeros(2, 2),
        dead: torch.zeros(2, 2),
        "visual_encoder.vision_model.embeddings.position_ids": torch.zeros(1, 5, dtype=torch.long),
        "llm.model.norm.weight": torch.zeros(2, 2),
    }
    found = moments_by_name(optimizer((2, 2), (2, 2), None, (2, 2)), weights, "x")
    assert {name: moments["exp_avg"][0, 0].item() for name, moments in found.items()} == {
        "llm.model.norm.weight": 0,
        lora: 1,
        "projector.model.0.weight": 3,
    }
    with pytest.raises(ModelError, match="x: its optimizer's state is of 1 parameters, which are not its 4 weights"):
        moments_by_name(optimizer((2, 2)), weights, "x")
    with pytest.raises(ModelError, match="--weights-only"):
        moments_by_name(optimizer((2, 2), (2, 2), None, (2, 3)), weights, "x")
    sgd = {"state": {0: {"momentum_buffer": None}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(ModelError, match="or is not AdamW's"):
        moments_by_name(sgd, {"projector.model.0.weight": torch.zeros(1)}, "x")


def test_a_head_that_is_the_embedding_is_one_parameter() -> None:
    embedding = torch.zeros(3, 2)
    weights = {"llm.model.embed_tokens.weight": embedding, "llm.lm_head.weight": embedding}
    assert parameters_in_order(weights) == ["llm.model.embed_tokens.weight"]
    assert list(to_live(weights, LLAMA, 2).live) == ["model.language_model.embed_tokens.weight"]
    apart = {**weights, "llm.lm_head.weight": embedding.clone()}
    assert len(parameters_in_order(apart)) == 2


def test_internlm2_cannot_hold_a_lora_a_each() -> None:
    stem = "model.language_model.layers.0.self_attn"
    live = {f"{stem}.{part}_proj.lora_A.default.weight": torch.randn(2, 6) for part in "qkv"}
    with pytest.raises(ModelError, match="lora_share_qkv"):
        from_live(live, LLAMA, internlm2=True)
