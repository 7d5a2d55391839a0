"""Each way to tune the LLM, beside each way to tune the tower, with and without four bits; and each family of LLM."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import SiglipVisionModel

from dianjing.model.build import assemble, build
from dianjing.model.language import load_language_model
from dianjing.model.stage import apply_stage, part_of
from dianjing.model.weights import trainable_state
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare
from tests.recipe_models import FAMILIES, write_family, write_siglip

WAYS = ("frozen", "lora", "full")
SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEARS = {kind: SPLIT for kind in FAMILIES} | {"phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}}
"""What LoRA stands on in a decoder layer."""
TEMPLATES = {"llama": "llama3_chat", "vicuna": "vicuna"}
REACHED = ("embeddings.", "pre_layrnorm.", "encoder.layers.0.", "encoder.layers.1.")
"""Of a tower of three layers, with the features of the last but one."""


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an LLM whose rows are whole blocks of NF4."""
    return write_family(tmp_path_factory.mktemp("tiny_llm"), "internlm2")


@pytest.mark.parametrize(
    ("llm", "tower", "quantization"),
    [case for case in product(WAYS, WAYS, ["", "nf4"]) if case[0] != "full" or not case[2]],  # refused in a recipe
)
def test_what_trains_has_a_gradient_and_nothing_else_has(
    make_recipe: MakeRecipe, llm: str, tower: str, quantization: str
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")
    model, dataset = prepare(
        make_recipe(
            "finetune", language_model={"tuning": llm, "quantization": quantization}, vision_tower={"tuning": tower}
        )
    )
    _, gradients = outcome(model, [dataset.batch(range(dataset.num_records))])
    assert gradients.keys() == trainable_state(model).keys()
    assert all(gradient.any() for gradient in gradients.values())
    by_part = {
        part: [name for name in gradients if part_of(name) == part] for part in ("language_model", "vision_tower")
    }
    for part, tuning in (("language_model", llm), ("vision_tower", tower)):
        assert bool(by_part[part]) == (tuning != "frozen")
        assert all(("lora_" in name) == (tuning == "lora") for name in by_part[part])
    assert all(name.removeprefix("model.vision_tower.").startswith(REACHED) for name in by_part["vision_tower"])
    if llm == "full":
        decoder = dict(model.model.language_model.named_parameters())
        assert {f"model.language_model.{name}" for name in decoder} | {"lm_head.weight"} == set(
            by_part["language_model"]
        )


@pytest.mark.parametrize(
    ("kind", "quantization"), [*((kind, "") for kind in FAMILIES), ("phi3", "nf4"), ("gemma", "nf4")]
)
def test_lora_finds_the_linears_of_each_family(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str, quantization: str
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")
    folder = str(write_family(tmp_path / kind, kind))
    model, dataset = prepare(
        make_recipe(
            "finetune",
            language_model={
                "folder": folder,
                "template": TEMPLATES.get(kind, "internlm2_chat"),
                "tuning": "lora",
                "quantization": quantization,
            },
        )
    )
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    expected = {f"model.language_model.layers.{layer}." for layer in (0, 1)}
    assert {name[: name.index("layers.") + 9] for name in names} == expected
    assert {name.rpartition(".")[2] for name in names} == LINEARS[kind]
    assert len(names) == 2 * len(LINEARS[kind])
    _, gradients = outcome(model, [dataset.batch(range(dataset.num_records))])
    assert len([name for name in gradients if "lora_" in name]) == 2 * len(names)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_tower_that_pools_has_a_head_that_never_trains(
    make_recipe: MakeRecipe, tiny_llm: Path, tmp_path: Path, tuning: str
) -> None:
    """SigLIP's head pools all patches into one; the projector reads the patches themselves."""
    llm, _ = load_language_model(tiny_llm, torch.float32)
    tower = SiglipVisionModel.from_pretrained(write_siglip(tmp_path / "siglip"))
    model = assemble(llm, tower, image_token_id=330, feature_layer=-2, seed=0)
    apply_stage(model, make_recipe("finetune", vision_tower={"tuning": tuning}))
    trained = [name for name, weight in tower.named_parameters() if weight.requires_grad]
    assert all(name.startswith(REACHED) for name in trained)
    linears = sum(isinstance(module, nn.Linear) for module in tower.encoder.layers[:2].modules())
    if tuning == "lora":
        assert sum("lora_A" in name for name in trained) == 2 * 6
    else:
        assert {name.partition(".")[0] for name in trained} == {"embeddings", "encoder"}
        assert linears == 2 * 6


def test_a_shared_down_projection_of_four_bit_layers(make_recipe: MakeRecipe) -> None:
    pytest.importorskip("bitsandbytes", reason="four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")
    settings = {"tuning": "lora", "quantization": "nf4", "lora_share_qkv": True}
    recipe = make_recipe("finetune", language_model=settings)
    model = build(recipe).model
    apply_stage(model, recipe)
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.lora_A["default"].weight is attention.k_proj.lora_A["default"].weight
    assert attention.q_proj.lora_A["default"].weight.dtype == torch.float32
