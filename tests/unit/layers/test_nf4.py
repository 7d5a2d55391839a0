"""The LLM's decoder in four bits: what is quantised, that it computes as its dequantised weights do, and trains."""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import nn

from dianjing.config.load import load_recipe, save_recipe
from dianjing.config.schema import Recipe
from dianjing.errors import ConfigError, ModelError
from dianjing.export.merge import merged_state
from dianjing.layers.nf4 import dequantized, is_nf4, num_bytes, num_parameters, require_bitsandbytes
from dianjing.model import build as building
from dianjing.model.build import build
from dianjing.model.forward import forward_loss
from dianjing.model.stage import apply_stage
from dianjing.model.weights import load_trainable_state, trainable_state
from tests.conftest import MakeRecipe
from tests.packs import assert_same, outcome, prepare
from tests.tiny import write_llm

pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")

QLORA = {"quantization": "nf4", "tuning": "lora"}
LARGEST_ERROR = 0.152 + 0.02
"""Half the widest gap between two of NF4's sixteen values, as a share of a block's largest, and what holding that
largest in 8 bits adds."""


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an LLM whose rows are whole blocks."""
    return write_llm(tmp_path_factory.mktemp("tiny_llm"), hidden_size=64, intermediate_size=128)


def unquantized(recipe: Recipe) -> Recipe:
    return replace(recipe, language_model=replace(recipe.language_model, quantization=""))


def quantized(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if is_nf4(weight)}


def test_all_linears_of_the_decoder_and_nothing_else(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(language_model={"quantization": "nf4"})
    model, plain = build(recipe).model, build(unquantized(recipe)).model
    linears = {
        f"{name}.weight"
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.layers.")
    }
    assert quantized(model).keys() == linears
    assert len(linears) == 2 * 7
    for name, weight in plain.named_parameters():
        if name not in linears:
            assert torch.equal(weight, model.get_parameter(name)), name


def test_each_value_is_the_nearest_of_sixteen(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(language_model={"quantization": "nf4"})
    model, plain = build(recipe).model, build(unquantized(recipe)).model
    for name, weight in quantized(model).items():
        before, after = plain.get_parameter(name), dequantized(weight)
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        blocks, kept = before.detach().flatten().split(64), after.flatten().split(64)
        for block, values in zip(blocks, kept, strict=True):
            assert len(values.unique()) <= 16
            assert (block - values).abs().max() < LARGEST_ERROR * block.abs().max()


def test_the_same_weights_give_the_same_bytes_in_either_precision(make_recipe: MakeRecipe) -> None:
    found = []
    for precision in ("fp32", "fp32", "bf16"):
        model = build(make_recipe(language_model={"quantization": "nf4"}, train={"precision": precision})).model
        states: list[Any] = [weight.quant_state for weight in quantized(model).values()]  # type: ignore[attr-defined]
        found.append(
            [
                (weight.data, state.absmax, state.state2.absmax, state.offset)
                for weight, state in zip(quantized(model).values(), states, strict=True)
            ]
        )
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def test_four_bits_are_counted_as_weights_and_as_bytes(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(language_model={"quantization": "nf4"})
    model, plain = build(recipe).model, build(unquantized(recipe)).model
    for name, weight in quantized(model).items():
        numbers = plain.get_parameter(name).numel()
        assert num_parameters(weight) == numbers
        blocks = -(-numbers // 64)
        assert num_bytes(weight) == numbers // 2 + blocks + 4 * -(-blocks // 256)
    report = apply_stage(model, recipe)
    assert report.parts[0].dtype == "fp32, nf4"
    assert report.parts[0].parameters == apply_stage(plain, unquantized(recipe)).parts[0].parameters
    console = Console(width=110, file=io.StringIO())
    console.print(report)
    assert "nf4" in console.file.getvalue()


@pytest.mark.parametrize(
    "settings", [{}, {"lora_head": True, "lora_share_qkv": True}], ids=["lora", "shared qkv and head"]
)
def test_it_trains_as_pefts_lora_on_the_dequantised_weights(make_recipe: MakeRecipe, settings: dict[str, Any]) -> None:
    recipe = make_recipe("finetune", language_model={**QLORA, **settings})
    model, dataset = prepare(recipe)
    reference = build(unquantized(recipe)).model
    with torch.no_grad():
        for name, weight in quantized(model).items():
            reference.get_parameter(name.replace(".base_layer", "")).copy_(dequantized(weight))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    settings_of = recipe.language_model
    lora = LoraConfig(r=settings_of.lora_rank, lora_alpha=int(settings_of.lora_alpha), target_modules=adapted)
    inject_adapter_in_model(lora, reference)
    if settings:
        for layer in reference.model.language_model.layers:
            attention: Any = layer.self_attn
            attention.k_proj.lora_A = attention.v_proj.lora_A = attention.q_proj.lora_A
    for name, weight in reference.named_parameters():
        weight.requires_grad_("lora_" in name or "projector" in name)
    load_trainable_state(reference, trainable_state(model))
    batches = [dataset.batch(range(dataset.num_records))]
    assert_same(outcome(model, batches), outcome(reference.train(), batches))


def test_dropout_and_checkpointing_leave_the_same_gradients(make_recipe: MakeRecipe) -> None:
    results = []
    for saving in (False, True):
        recipe = make_recipe(
            "finetune",
            language_model={**QLORA, "lora_dropout": 0.3},
            train={"gradient_checkpointing": "on" if saving else "off"},
        )
        model, dataset = prepare(recipe)
        torch.manual_seed(11)
        results.append(outcome(model, [dataset.batch(range(dataset.num_records))]))
    assert_same(*results)
    assert all(gradient.any() for gradient in results[0][1].values())


def test_bf16_is_near_fp32(make_recipe: MakeRecipe) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        settings = {**QLORA, "lora_head": True, "lora_alpha": 4.0}
        model, dataset = prepare(make_recipe("finetune", train={"precision": precision}, language_model=settings))
        loss, gradients = outcome(model, [dataset.batch(range(dataset.num_records))])
        assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients.values())
        losses.append(loss)
    assert losses[0] != losses[1]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_answers_on_the_way_change_no_weight(make_recipe: MakeRecipe) -> None:
    """Some CPUs have a fast path for answers that would round the weights for good."""
    model, dataset = prepare(make_recipe("finetune", language_model=QLORA))
    batch = dataset.batch(range(dataset.num_records))
    before = copy.deepcopy({name: dequantized(weight) for name, weight in quantized(model).items()})
    with torch.no_grad():
        answering = forward_loss(model.eval(), batch)
    assert forward_loss(model.train(), batch) == answering
    assert all(torch.equal(before[name], dequantized(weight)) for name, weight in quantized(model).items())


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_merged_weights_are_plain_and_compute_the_same(make_recipe: MakeRecipe, tuning: str) -> None:
    settings = {"quantization": "nf4", "tuning": tuning, "lora_head": True, "lora_share_qkv": True, "lora_alpha": 4.0}
    recipe = make_recipe("finetune", language_model=settings, vision_tower={"tuning": "lora"})
    model, dataset = prepare(recipe)
    merged = build(unquantized(recipe)).model
    before = {name: weight.clone() for name, weight in merged.state_dict().items()}
    merged.load_state_dict(merged_state(model))
    assert not torch.equal(merged.lm_head.weight, before["lm_head.weight"]) or tuning == "frozen"
    batch = dataset.batch(range(dataset.num_records))
    torch.testing.assert_close(logits(model, batch), logits(merged, batch), rtol=0, atol=1e-4)
    merged.load_state_dict(before)
    assert (logits(model, batch) - logits(merged, batch)).abs().max() > 1e-2, "the control: not quantised"


def logits(model: Any, batch: Any) -> torch.Tensor:
    """Return the logits of the supervised rows, caught at the head."""
    caught: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    with torch.no_grad():
        forward_loss(model.eval(), batch)
    hook.remove()
    return caught[0]


def test_without_bitsandbytes_nothing_is_loaded(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(building, "load_tokenizer", pytest.fail)
    with pytest.raises(ConfigError, match=r"pip install .*bitsandbytes"):
        build(make_recipe(language_model={"quantization": "nf4"}))


def test_it_is_there() -> None:
    require_bitsandbytes()


def test_all_weights_of_a_four_bit_llm_cannot_train(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    save_recipe(
        make_recipe("finetune", language_model={"tuning": "full", "quantization": "nf4"}), tmp_path / "recipe.toml"
    )
    with pytest.raises(ConfigError, match=r'tuning is "full", but language_model\.quantization is "nf4"'):
        load_recipe(tmp_path / "recipe.toml")


def test_rows_that_are_no_whole_blocks(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    narrow = str(write_llm(tmp_path / "narrow", hidden_size=64, intermediate_size=96))
    with pytest.raises(ModelError, match="down_proj has 96 inputs, not a multiple of 64"):
        build(make_recipe(language_model={"quantization": "nf4", "folder": narrow}))


def test_unknown_way_to_hold_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    save_recipe(make_recipe(), tmp_path / "recipe.toml")
    with pytest.raises(ConfigError, match='is needed; did you mean "nf4"'):
        load_recipe(tmp_path / "recipe.toml", {"language_model.quantization": "fp4"})
