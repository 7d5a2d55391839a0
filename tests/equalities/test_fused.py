"""Fused layers are the layers: losses and gradients against the same model as transformers computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModel, CLIPVisionConfig, SiglipVisionConfig

from dianjing.layers.fused import adapters, decoder, gradients, linear, tower
from dianjing.model.compile import speed_up
from dianjing.model.forward import FUSED, forward_loss
from dianjing.train.optim import set_learning_rates
from dianjing.train.shards import start_engine
from tests.conftest import MakeRecipe
from tests.llm_families import write_family
from tests.packs import assert_same, outcome, prepare
from tests.packs import gradients as gradients_of
from tests.tiny import write_llm, write_siglip

LORA = {"tuning": "lora", "lora_alpha": 1.0}
STEP = 2e-3
"""Of a weight, to see what it does to the loss."""
FROZEN: dict[str, str] = {}
ROUNDING = 3
"""The adapters' GEMMs run in another order than in fp32 elsewhere, which adds them to the weights first."""


def both(make_recipe: MakeRecipe, stage: str = "finetune", **sections: Any) -> tuple[Any, Any, Any]:
    """Return a model, the same one with its layers fused, and the data."""
    recipe = make_recipe(stage, **sections)
    plain, dataset = prepare(recipe)
    fused, _ = prepare(recipe)
    assert speed_up(fused) == "layers: language model fused, vision tower fused"
    return plain, fused, dataset


@pytest.mark.parametrize(
    ("stage", "language_model", "vision_tower"),
    [("pretrain", FROZEN, FROZEN), ("finetune", LORA, LORA), ("finetune", LORA, FROZEN), ("finetune", FROZEN, LORA)],
)
@pytest.mark.parametrize("train", [{}, {"gradient_checkpointing": "on"}])
def test_fused_layers_are_the_layers(
    make_recipe: MakeRecipe, stage: str, language_model: Any, vision_tower: Any, train: dict[str, Any]
) -> None:
    plain, fused, dataset = both(
        make_recipe, stage, language_model=language_model, vision_tower=vision_tower, train=train
    )
    # One after the other, a pack without pictures among them.
    for records in ([0, 1, 3], [2, 7], [0, 5], [0, 6, 4, 1]):
        batch = dataset.batch(records)
        assert_same(outcome(fused, [batch]), outcome(plain, [batch]), ROUNDING)


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize("family", ["internlm2", "qwen2"])
def test_adapters_of_large_rank_too(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dropout: float
) -> None:
    """Each adapter is then multiplied by itself; dropout, even of nothing, keeps them apart from the frozen weights."""
    monkeypatch.setattr(adapters, "SMALL", 0)
    folder = write_family(tmp_path / family, family)
    lora = {**LORA, "lora_rank": 24, "lora_dropout": dropout}
    plain, fused, dataset = both(make_recipe, language_model={**lora, "folder": str(folder)}, vision_tower=lora)
    # Few rows and many: adapters are added to the gradients, or to the weights.
    for records in ([2], [0, 1, 3, 4]):
        batch = dataset.batch(records)
        assert_same(outcome(fused, [batch]), outcome(plain, [batch]), ROUNDING)


@pytest.mark.parametrize("merged", [True, False])
def test_gradients_are_the_same_with_adapters_in_the_weights(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    monkeypatch.setattr(linear.FusedLinear, "_sum_is_less_work", lambda *_: merged)
    plain, fused, dataset = both(make_recipe, language_model=LORA, vision_tower=LORA)
    batch = dataset.batch([0, 1, 2])
    assert_same(outcome(fused, [batch]), outcome(plain, [batch]), ROUNDING)


def test_padded_documents_too(make_recipe: MakeRecipe) -> None:
    plain, fused, dataset = both(make_recipe, language_model=LORA, vision_tower=LORA)
    batch = dataset.batch([1, 3, 1])
    for shape in ((3, batch.max_seqlen), (4, batch.max_seqlen + 3)):
        laid_out = replace(batch, padded_shape=shape)
        assert_same(outcome(fused, [laid_out]), outcome(plain, [batch]), ROUNDING)


def test_of_a_siglip_tower_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for act in ("gelu_pytorch_tanh", "gelu"):
        folder = write_siglip(tmp_path / act, hidden_act=act)
        plain, fused, dataset = both(make_recipe, language_model=LORA, vision_tower={**LORA, "folder": str(folder)})
        batch = dataset.batch([0, 4])
        assert_same(outcome(fused, [batch]), outcome(plain, [batch]), ROUNDING)


@pytest.mark.parametrize(
    ("kind", "side", "patch"), [(CLIPVisionConfig, 30, 6), (SiglipVisionConfig, 32, 8), (SiglipVisionConfig, 34, 7)]
)
def test_patches_are_rows_of_a_product(kind: Any, side: int, patch: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = AutoModel.from_config(kind(image_size=side, patch_size=patch, **sizes))
    module = getattr(whole, "vision_model", whole).embeddings
    pictures = torch.randn(3, 3, side, side)
    torch.testing.assert_close(tower.embedded(module, pictures), module(pictures))
    assert tower.embedded(module, pictures[:0]).shape == module(pictures[:0]).shape


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "internlm2", "internlm3", "llama3", "smollm"])
def test_of_other_families_too(make_recipe: MakeRecipe, tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / family, family)
    plain, fused, dataset = both(make_recipe, language_model={**LORA, "folder": str(folder)}, vision_tower=LORA)
    batch = dataset.batch([0, 1, 2])
    assert_same(outcome(fused, [batch]), outcome(plain, [batch]), ROUNDING)


@pytest.mark.parametrize("records", [[0], [0, 4], [2]])
def test_kernels_get_rows_one_after_the_other(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[int]
) -> None:
    """Kernels read memory row by row, operators do not ask: SigLIP's embeddings of one picture lie by columns."""
    seen: list[str] = []

    def watched(name: str, plain: Any) -> Any:
        def run(*arguments: Any, **settings: Any) -> Any:
            tensors = [value for value in (*arguments, *settings.values()) if isinstance(value, torch.Tensor)]
            assert all(tensor.is_contiguous() for tensor in tensors), name
            seen.append(name)
            return plain(*arguments, **settings)

        return run

    for module in (decoder, tower):
        for name in ("norm", "norm_backward", "rope", "rope_backward", "swiglu", "swiglu_backward", "gather_rows"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    siglip = str(write_siglip(tmp_path / "siglip"))
    _, model, dataset = both(make_recipe, language_model=LORA, vision_tower={**LORA, "folder": siglip})
    outcome(model, [dataset.batch(records)])
    assert {"norm", "norm_backward", "rope_backward"} <= set(seen)


def test_what_an_answer_makes_first_can_change(make_recipe: MakeRecipe) -> None:
    """A sample answer comes before the first step, in inference mode, and is the first to go through the tower."""
    plain, model, dataset = both(make_recipe, language_model=LORA, vision_tower=LORA)
    batch = dataset.batch([0, 1])
    with torch.inference_mode():
        forward_loss(model, batch)
    for one in (plain, model):
        with torch.no_grad():
            for name, weight in one.named_parameters():
                if "lora_" in name:
                    weight += 0.01
    assert_same(outcome(model, [batch]), outcome(plain, [batch]), ROUNDING)


def test_a_window_is_used_where_transformers_uses_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A Llama's config may name one (made of a Mistral, say), and is a Llama all the same."""
    folder = write_llm(tmp_path / "llm", sliding_window=7)
    plain, model, dataset = both(make_recipe, language_model={**LORA, "folder": str(folder)}, vision_tower=LORA)
    batch = dataset.batch([0, 1])
    assert_same(outcome(model, [batch]), outcome(plain, [batch]), ROUNDING)


def test_a_pack_with_nothing_to_learn(make_recipe: MakeRecipe) -> None:
    _, model, dataset = both(make_recipe, language_model=LORA, vision_tower=LORA)
    batch = dataset.batch([0, 1])
    nothing = replace(batch, target_rows=batch.target_rows[:0], targets=batch.targets[:0])
    loss, found = outcome(model, [nothing])
    assert loss == 0
    assert all((gradient == 0).all() for gradient in found.values())


def test_in_bf16_they_are_as_near_the_truth(make_recipe: MakeRecipe) -> None:
    exact, dataset = prepare(make_recipe("finetune", language_model=LORA, vision_tower=LORA))
    plain, fused, _ = both(make_recipe, language_model=LORA, vision_tower=LORA, train={"precision": "bf16"})
    batch = dataset.batch([0, 1, 3, 4])
    true = flat(outcome(exact, [batch]))
    distances = [float((flat(outcome(model, [batch])) - true).norm()) for model in (plain, fused)]
    assert 0 < distances[1] < 1.1 * distances[0]


@pytest.mark.parametrize("merged", [True, False])
def test_weights_changed_between_packs_are_read(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, merged: bool
) -> None:
    """Copies of the adapters, and sums with them, are kept; an optimizer's fused step leaves no mark of its own."""
    monkeypatch.setattr(linear.FusedLinear, "_sum_is_less_work", lambda *_: merged)
    settings: Any = {"language_model": LORA, "vision_tower": LORA, "train": {"precision": "bf16"}}
    _, fused, dataset = both(make_recipe, **settings)
    batch = dataset.batch([0, 1])
    before = forward_loss(fused, batch).item()
    recipe = make_recipe("finetune", **settings)
    engine = start_engine(recipe, Accelerator(), fused)
    set_learning_rates(engine.optimizer, 10.0)
    outcome(fused, [batch])
    engine.step(torch.ones(()))
    fresh, _ = prepare(make_recipe("finetune", **settings))
    fresh.load_state_dict(fused.state_dict())
    speed_up(fresh)
    one, other = outcome(fused, [batch]), outcome(fresh, [batch])
    assert one[0].item() == other[0].item() != before
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


@pytest.mark.parametrize("small", [0, 1000])
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_gradients_of_packs_add_up(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, small: int, dropout: float
) -> None:
    """Where the decoder's adapters hold them, all but those of small adapters side by side."""
    monkeypatch.setattr(adapters, "SMALL", small)
    added: list[int] = []
    add = gradients.add_gemm_tn
    monkeypatch.setattr(gradients, "add_gemm_tn", lambda *given: (added.append(1), add(*given)))
    lora = {**LORA, "lora_dropout": dropout}
    plain, fused, dataset = both(make_recipe, language_model=lora, vision_tower=lora)
    found = []
    for model in (plain, fused):
        model.zero_grad()
        for records in ([0, 1], [2], [3, 4]):
            forward_loss(model, dataset.batch(records)).backward()
        found.append((torch.zeros(()), gradients_of(model)))
    assert_same(found[1], found[0], ROUNDING)
    layers = len(fused.model.language_model.layers)
    # Of q, k and v; of what they give out; of gate and up; of down: A (side by side, but for dropout) and B.
    a, b = (7 if dropout else 4), (2 if small else 7)
    assert len(added) == 2 * layers * (a + b)


def test_dropout_is_drawn_again_in_the_backward_pass(make_recipe: MakeRecipe) -> None:
    drops = {**LORA, "lora_dropout": 0.3}
    for train in ({}, {"gradient_checkpointing": "on"}):
        _, fused, dataset = both(make_recipe, language_model=drops, vision_tower=drops, train=train)
        batch, weights = dataset.batch([0, 1]), dict(fused.named_parameters())

        def loss(model: Any = fused, batch: Any = batch) -> torch.Tensor:
            torch.manual_seed(7)
            return forward_loss(model, batch)

        assert loss() == loss()
        torch.manual_seed(8)
        assert forward_loss(fused, batch) != loss()
        fused.zero_grad()
        loss().backward()
        for part in ("language_model.layers.0.self_attn.k_proj", "language_model.layers.1.mlp.down_proj", "fc1"):
            for half in ("lora_A", "lora_B"):
                name = next(name for name in weights if part in name and half in name)
                weight = weights[name]
                direction = torch.randn_like(weight)
                assert weight.grad is not None
                expected = float((weight.grad * direction).sum())
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        weight += sign * STEP * direction
                        ends.append(float(loss()))
                        weight -= sign * STEP * direction
                assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(expected, rel=0.02, abs=0.1), name


def test_other_layers_stay_as_they_are(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    whole, _ = prepare(make_recipe("finetune", language_model={"tuning": "full"}, vision_tower={"tuning": "full"}))
    assert speed_up(whole) == "layers: language model compiled, vision tower compiled"
    shared, _ = prepare(make_recipe("finetune", language_model={**LORA, "lora_share_qkv": True}))
    assert speed_up(shared) == "layers: language model compiled, vision tower fused"
    assert not hasattr(shared.model.language_model, FUSED)
    assert len(compiled) == 2 + 2 + 2
    sharded, _ = prepare(make_recipe("finetune", language_model=LORA))
    assert speed_up(sharded, fuse=False) == "layers: language model compiled, vision tower compiled"


def test_fused_weights_keep_their_names_and_values(make_recipe: MakeRecipe) -> None:
    plain, fused, dataset = both(make_recipe, language_model=LORA, vision_tower=LORA)
    # Engines send weights to all ranks before the first pass, and NCCL takes none that lie in pieces.
    assert all(weight.is_contiguous() for weight in fused.parameters())
    for _ in range(2):
        found = fused.state_dict()
        assert list(found) == list(plain.state_dict())
        for name, weight in plain.state_dict().items():
            assert torch.equal(found[name], weight), name
        forward_loss(fused, dataset.batch([0, 1]))
    assert not all(weight.is_contiguous() for weight in fused.parameters())


def test_b_takes_no_more_room_next_to_the_weights_than_it_needs(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "SMALL", 0)
    rank = 24
    model, _ = prepare(make_recipe("finetune", language_model={**LORA, "lora_rank": rank}))
    gate_up = decoder.FusedDecoderLayer(model.model.language_model.layers[0]).gate_up
    gate_up.copies(torch.float32)
    rows, columns = gate_up.weights.W.shape
    assert gate_up.weights.W.untyped_storage().nbytes() == 4 * (rows * (columns + rank) + rank)


def flat(found: Any) -> torch.Tensor:
    return torch.cat([found[0].flatten(), *(gradient.flatten() for gradient in found[1].values())]).double()
