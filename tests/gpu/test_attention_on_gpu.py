"""The GPU's kernel for packed attention against the loop over documents, and a whole step in bf16."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dianjing.model.attention import packed_attention
from tests.conftest import MakeRecipe
from tests.packs import outcome, prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: packed attention's kernel is not tested"),
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pack_on_the_gpu_is_its_records_one_by_one(make_recipe: MakeRecipe, precision: str) -> None:
    tuning = {"language_model": {"tuning": "lora"}, "vision_tower": {"tuning": "lora"}}
    model, dataset = prepare(make_recipe("finetune", train={"precision": precision}, **tuning))
    on_cpu = outcome(model, [dataset.batch(range(dataset.num_records))])
    model.cuda()
    packed = outcome(model, [dataset.batch(range(dataset.num_records)).to("cuda")])
    alone = outcome(model, [dataset.batch([index]).to("cuda") for index in range(dataset.num_records)])
    near = {"fp32": 1e-4, "bf16": 3e-2}[precision]
    for other in (alone, on_cpu):
        assert other[0].item() == pytest.approx(packed[0].item(), rel=near)
        for name, gradient in packed[1].items():
            expected = other[1][name].cuda()
            assert float((gradient - expected).norm()) <= 4 * near * float(expected.norm()), name
