"""The GPU's kernel for packed attention against the loop over documents, and a whole step in bf16."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dianjing.layers.attention import packed_attention
from dianjing.layers.padded import padded_layout
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare
from tests.tiny import gentle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: packed attention's kernel is not tested"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of itself
]

MODULE: Any = SimpleNamespace()
LENGTHS = [200, 1, 77, 300]


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_the_kernel_is_the_loop(kv_heads: int) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 64, device="cuda") for heads in (8, kv_heads, kv_heads)]
    spans = {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda(), "max_seqlen": max(LENGTHS)}
    weights = torch.randn(1, sum(LENGTHS), 8, 64, device="cuda")
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [rows.to(dtype).requires_grad_() for rows in states]
        output, _ = packed_attention(MODULE, *inputs, None, scaling=0.125, **spans)
        gradients = torch.autograd.grad((output.float() * weights).sum(), inputs)
        found.append([output.detach().float(), *(gradient.float() for gradient in gradients)])
    for loop, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, loop, rtol=0, atol=0.02 * float(loop.abs().max()))


def test_padded_it_is_the_kernel() -> None:
    torch.manual_seed(0)
    lengths = [300, 280, 320]
    states = [torch.randn(1, heads, sum(lengths), 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    position_ids = torch.cat([torch.arange(length) for length in lengths]).cuda()
    weights = torch.randn(1, sum(lengths), 8, 64, device="cuda")
    found = []
    for layout in (None, padded_layout(cu_seqlens, position_ids, (4, 320))):
        inputs = [rows.clone().requires_grad_() for rows in states]
        spans: Any = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths), "padded": layout}
        output, _ = packed_attention(MODULE, *inputs, None, scaling=0.125, **spans)
        gradients = torch.autograd.grad((output.float() * weights).sum(), inputs)
        found.append([output.detach().float(), *(gradient.float() for gradient in gradients)])
    for kernel, dense in zip(*found, strict=True):
        torch.testing.assert_close(dense, kernel, rtol=0, atol=0.02 * float(kernel.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pack_on_the_gpu_is_its_records_one_by_one(make_recipe: MakeRecipe, tmp_path: Path, precision: str) -> None:
    sections = gentle(tmp_path, tuning={"tuning": "lora"})
    exact = flat(*in_one_pack(make_recipe("finetune", **{**sections, "train": {}}), "cpu"))
    recipe = make_recipe("finetune", **{**sections, "train": {"precision": precision}})
    on_cpu = flat(*in_one_pack(recipe, "cpu"))
    model, dataset = in_one_pack(recipe, "cuda")
    packed = flat(model, dataset)
    alone = torch.cat([flat(model, dataset, [index]) for index in range(dataset.num_records)])
    assert packed[0] == pytest.approx(alone[:: len(packed)].sum(), rel=1e-3)
    alone = alone.view(dataset.num_records, -1).sum(0)
    # In fp32 the GPU's convolution rounds to TF32; in bf16 a pack is as near the truth as its records, and the CPU.
    near = 2e-3 * exact.norm() if precision == "fp32" else 1.5 * max((alone - exact).norm(), (on_cpu - exact).norm())
    assert (packed - exact).norm() < near < 0.5 * exact.norm()


def in_one_pack(recipe: Any, device: str) -> tuple[Any, Any]:
    model, dataset = prepare(recipe)
    return model.to(device), dataset


def flat(model: Any, dataset: Any, records: list[int] | None = None) -> torch.Tensor:
    """Return loss and gradients of records in one pack."""
    batch = dataset.batch(records or range(dataset.num_records)).to(model.device)
    loss, gradients = outcome(model, [batch])
    return torch.cat([loss.cpu().flatten(), *(gradient.cpu().flatten() for gradient in gradients.values())])
