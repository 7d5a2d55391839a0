"""Samples a second, against rows measured on one H200, and in how they depend on things."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dianjing.errors import ConfigError
from dianjing.plan.flops import flops
from dianjing.plan.gpus import GPUS, any_gpu, find_gpu, gpu_here
from dianjing.plan.lengths import Lengths
from dianjing.plan.shapes import INTERNLM2_1_8B
from dianjing.plan.speed import samples_per_second
from tests.conftest import MakeRecipe

H200 = GPUS[0]
STAGE1 = Lengths(tokens=598, tokens_squared=598**2, supervised=6.8, pictures=1)
STAGE2 = Lengths(tokens=804, tokens_squared=1.02 * 804**2, supervised=163, pictures=0.946)


@pytest.fixture
def speed(make_recipe: MakeRecipe) -> Any:
    def predict(lengths: Lengths, gpu: Any = H200, *, packs: int = 9, gpus: int = 1, saving: bool = False, **llm: Any):
        tower = {"tuning": llm["tuning"], "lora_rank": 64} if llm else {}
        stage = "finetune" if llm else "pretrain"
        llm = {"lora_rank": 512, **llm}
        recipe = make_recipe(stage, language_model=llm, vision_tower=tower, train={"precision": "auto"})
        work = flops(INTERNLM2_1_8B, recipe, lengths)
        return samples_per_second(
            work, INTERNLM2_1_8B, recipe, gpu, checkpointing=saving, records=128, packs=packs, gpus=gpus
        )

    return predict


def test_rows_measured_on_an_h200(speed: Any) -> None:
    assert speed(STAGE1, packs=5) == pytest.approx(133.2, rel=0.01)
    assert speed(STAGE2, tuning="lora") == pytest.approx(63.6, rel=0.01)


def test_what_makes_it_slower(speed: Any) -> None:
    plain = speed(STAGE2, tuning="lora")
    assert speed(STAGE2, tuning="lora", saving=True) < plain
    assert speed(STAGE2, tuning="lora", quantization="nf4") == pytest.approx(plain / 1.15)
    assert plain < speed(STAGE2, tuning="lora", quantization="fp8") < 2 * plain
    assert speed(STAGE2, tuning="lora", packs=100) < plain / 4  # a pack of one record waits for the CPU
    assert 7 < speed(STAGE2, tuning="lora", gpus=8, packs=1) / plain < 8
    by_gpu = [speed(STAGE2, find_gpu(name), tuning="lora") for name in ("H100", "L40S", "4090", "3090")]
    assert sorted([plain, *by_gpu], reverse=True) == [plain, *by_gpu]


def test_fp8_needs_its_units(speed: Any) -> None:
    a100 = find_gpu("a100-80gb")
    assert speed(STAGE1, a100, tuning="frozen", quantization="fp8") == speed(STAGE1, a100, tuning="frozen")


def test_a_gpu_by_its_memory_alone(speed: Any) -> None:
    assert math.isnan(speed(STAGE1, any_gpu(24, None)))
    assert speed(STAGE1, any_gpu(24, 989.0), packs=5) == pytest.approx(133.2, rel=0.01)
    assert any_gpu(24, None).num_bytes == 24 * 2**30


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("h100", "H100"),
        ("h100 pcie", "H100 PCIe"),
        ("a100-40gb", "A100 40GB"),
        ("L4", "L4"),
    ],
)
def test_gpus_are_found_by_what_people_call_them(name: str, found: str) -> None:
    assert find_gpu(name).name == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100", "which one, A100 80GB or A100 40GB?"),
        ("V100", "it computes no bf16"),
        ("Tesla T4", "not in the table"),
        ("H2000", "did you mean 'H200'?"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_gpu(name)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU"),
    ],
)
def test_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch, name: str, found: str) -> None:
    properties = type("Properties", (), {"total_memory": 5 * 2**30})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: properties)
    gpu = gpu_here()
    assert gpu
    assert (gpu.name, gpu.gib) == (found, 5.0)
    known = next((other for other in GPUS if other.name == found), None)
    assert gpu == replace(known, gib=5.0) if known else math.isnan(gpu.bf16)
