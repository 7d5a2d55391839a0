"""The memory model, against what layers really keep and against peaks measured on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from dianjing.config.schema import DataConfig, LanguageModelConfig, Recipe, TrainConfig, VisionTowerConfig
from dianjing.data.collate import Batch
from dianjing.model.build import assemble
from dianjing.model.compile import speed_up
from dianjing.model.forward import forward_loss
from dianjing.model.stage import apply_stage
from dianjing.plan.lengths import Lengths
from dianjing.plan.memory import Memory, heaviest_pack, memory
from dianjing.plan.weights import weights_of, weights_of_recipe

GIB = 2**30


def recipe_of(tuning: Any = "frozen", *, rank: int = 512, dropout: float = 0.0, **sections: Any) -> Recipe:
    recipe = Recipe(
        stage="pretrain" if tuning == "frozen" else "finetune",
        output="run",
        language_model=LanguageModelConfig(folder="llm", tuning=tuning, lora_rank=rank, lora_dropout=dropout),
        vision_tower=VisionTowerConfig(folder="tower", tuning=tuning, lora_rank=rank // 8, lora_dropout=dropout),
        data=DataConfig(path="data.json"),
        train=TrainConfig(precision="bf16"),
    )
    for name, values in sections.items():
        recipe = replace(recipe, **{name: replace(getattr(recipe, name), **values)})
    return recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """InternLM2-1.8B in Llama's layout and CLIP ViT-L/14-336: their config.json, no weights."""
    folder = tmp_path_factory.mktemp("models")
    LlamaConfig(
        vocab_size=92544,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
    ).save_pretrained(folder / "llm")
    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ).save_pretrained(folder / "tower")
    return {name: {"folder": str(folder / short)} for name, short in PARTS.items()}


LORAS = (("frozen", 0.0), ("lora", 0.0), ("lora", 0.1))
PARTS = {"language_model": "llm", "vision_tower": "tower"}


def records(mean: float, shortest: int, supervised: float, pictures: float = 1.0) -> Lengths:
    return Lengths(
        tokens=mean,
        tokens_squared=mean**2,
        supervised=supervised,
        pictures=pictures,
        longest=1100,
        supervised_share=supervised / mean,
        picture_share=1 / shortest,
    )


XTUNER = {"quantization": "nf4", "lora_head": True, "lora_share_qkv": True}
MEASURED = {
    # benchmarks/results/2026-11-28 and, in four bits, 2026-11-25: what torch.cuda.max_memory_allocated said on one H200
    # (Packs of at most 16,384 positions, which were even: the longest had 15,572.)
    "stage1-bf16": ("frozen", 0.0, {}, 15572, 256, records(598, 592, 7), 23.3),
    "stage1-fp8": ("frozen", 0.0, {"quantization": "fp8"}, 15572, 256, records(598, 592, 7), 21.9),
    "XTuner's pretrain": ("frozen", 0.0, {"quantization": "nf4"}, 4096, 16, records(605, 592, 15), 7.2),
    "XTuner's finetune": ("lora", 0.05, XTUNER, 4096, 16, records(640, 600, 30), 26.1),
}


@pytest.mark.parametrize("row", MEASURED)
def test_peaks_measured_on_a_gpu(folders: dict[str, Any], row: str) -> None:
    tuning, dropout, held, pack_tokens, batch, lengths, peak = MEASURED[row]
    sections = {
        "language_model": {**folders["language_model"], **held},
        "vision_tower": folders["vision_tower"],
        "data": {"pack_tokens": pack_tokens},
        "train": {"global_batch_size": batch},
    }
    recipe = recipe_of(tuning, dropout=dropout, **sections)
    predicted = memory(weights_of_recipe(recipe), recipe, lengths, checkpointing=False)
    assert predicted.tensors / GIB == pytest.approx(peak, rel=0.05)
    assert predicted.total > predicted.tensors


def test_known_counts_of_internlm2(folders: dict[str, Any]) -> None:
    weights = weights_of_recipe(recipe_of("lora", **folders))
    assert weights.trainable == {"language_model": 553_648_128, "vision_tower": 27_131_904, "projector": 6_295_552}
    assert weights.parameters["language_model"] - weights.trainable["language_model"] == 1_889_110_016
    assert sum(weights.frozen_bytes.values()) == 2 * (1_889_110_016 + 303_507_456)


def kept_by_layers(
    recipe: Recipe, layers: int, tower_layers: int, pack: Batch, fused: bool, family: str = "llama"
) -> tuple[int, Memory]:
    """Return the bytes that autograd saves in a forward pass of a model in bf16, and what is predicted."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads)).bfloat16()
    llm.config.dtype = torch.bfloat16
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": tower_layers, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=112, patch_size=14)).bfloat16()
    model = assemble(llm, tower, 511, -2, 0)
    apply_stage(model, recipe)
    if fused:
        assert "compiled" not in speed_up(model)
        with torch.no_grad():
            forward_loss(model.train(), pack)  # fused layers move their weights in the first pass
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        forward_loss(model.train(), pack)
    size = sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in own)
    lengths = records(pack.num_tokens / 4, 1, 1)
    lengths = replace(lengths, longest=pack.num_tokens, picture_share=pack.num_images / pack.num_tokens)
    recipe = replace(recipe, data=replace(recipe.data, pack_tokens=pack.num_tokens))
    return size, memory(weights_of(model), recipe, lengths, checkpointing=False, compiled=fused)


def pack_of(documents: int = 4, length: int = 256, patches: int = 64) -> Batch:
    starts = torch.arange(documents) * length
    rows = (starts[:, None] + torch.arange(length - 20, length - 1)).flatten()
    ids = torch.randint(0, 500, (documents * length,), generator=torch.Generator().manual_seed(0))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(length).repeat(documents),
        cu_seqlens=torch.arange(0, documents * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        padded_shape=None,
        pixels=torch.randint(0, 255, (documents, 3, 112, 112), dtype=torch.uint8),
        pixel_table=torch.randn(3, 256, generator=torch.Generator().manual_seed(0)),
        image_positions=(starts[:, None] + torch.arange(patches)).flatten(),
        target_rows=rows,
        targets=ids[rows],
        pictures=(1,) * documents,
        ids=("a", "b", "c", "d"),
    )


@pytest.mark.parametrize(
    ("tuning", "dropout", "fused"),
    [
        *[(tuning, dropout, fused) for tuning, dropout in LORAS for fused in (False, True)],
        ("full", 0.0, False),
    ],
)
@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_what_two_more_layers_keep(tuning: str, dropout: float, fused: bool, part: str) -> None:
    """Uncompiled, on a CPU, where attention's answers are kept a second time, in the order of the output layer."""
    recipe, pack = recipe_of(tuning, rank=64, dropout=dropout), pack_of()
    few = kept_by_layers(recipe, 3, 4, pack, fused)
    many = kept_by_layers(recipe, *((5, 4) if part == "decoder" else (3, 6)), pack, fused)
    names = ["activations of the LLM", "activations of tower and projector"]
    names += ["copies of what trains, for bf16"] * (not fused)  # fused layers hold them, autograd does not
    predicted, before = (sum(found.parts.get(name, 0) for name in names) for _, found in (many, few))
    twice = part == "decoder" and tuning != "frozen" and (fused or not dropout)
    again = 2 * 2 * 256 * pack.num_tokens if twice else 0
    assert predicted - before == pytest.approx(many[0] - few[0] - again, rel=0.04)


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_what_two_more_layers_with_qk_norm_keep(tuning: str) -> None:
    recipe, pack = recipe_of(tuning, rank=64), pack_of()
    (few, before), (many, after) = (kept_by_layers(recipe, layers, 4, pack, True, "qwen3") for layers in (3, 5))
    predicted = after.parts["activations of the LLM"] - before.parts["activations of the LLM"]
    again = 2 * 2 * 256 * pack.num_tokens if tuning == "lora" else 0
    assert predicted == pytest.approx(many - few - again, rel=0.04)


def test_what_saves_memory(folders: dict[str, Any]) -> None:
    weights, lengths = weights_of_recipe(recipe_of("lora", **folders)), records(800, 640, 150)

    def total(gpus: int = 1, checkpointing: bool = False, compiled: bool = True, **sections: Any) -> int:
        train = {"global_batch_size": 1024, **sections.pop("train", {})}
        other = recipe_of("lora", **{**folders, "data": {"pack_tokens": 8192}, **sections}, train=train)
        found = memory(weights, other, lengths, checkpointing=checkpointing, compiled=compiled, gpus=gpus)
        return found.total

    assert total(checkpointing=True) < total() < total(compiled=False)
    assert total(data={"pack_tokens": 4096}) < total()
    assert total(gpus=8) > total()  # the buckets in which gradients meet
    sharded = [total(gpus=8, train={"engine": name}) for name in ("ddp", "deepspeed_zero2", "fsdp2")]
    assert sorted(sharded, reverse=True) == sharded


def test_the_heaviest_pack_is_no_larger_than_the_step() -> None:
    recipe, lengths = recipe_of(train={"global_batch_size": 4}), records(600, 600, 20)
    assert heaviest_pack(recipe, lengths).tokens == 4096
    assert heaviest_pack(recipe, lengths, gpus=4).tokens == 1100
    assert heaviest_pack(recipe, lengths).pictures == 7
