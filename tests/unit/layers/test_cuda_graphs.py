"""Gradients of CUDA graphs, added up over packs; tests/gpu has the graphs themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dianjing.layers.cuda_graphs import _GradientBuffer


def test_gradients_of_packs_add_up_where_the_weights_hold_them() -> None:
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,))]
    gradients = _GradientBuffer(weights)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor, *_weights: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            gradients.newest.copy_(torch.arange(17.0) * gradient)
            return None, *gradients.add()

    def held() -> Tensor:
        return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])

    for _ in range(2):  # steps
        for pack, total in ((1.0, 1.0), (2.0, 3.0), (5.0, 8.0)):
            Replay.apply(torch.tensor(pack), *weights).backward(torch.tensor(pack))
            assert torch.equal(held(), torch.arange(17.0) * total)
            assert gradients._sum is not None
            assert gradients._sum.data_ptr() == weights[0].grad.data_ptr()  # type: ignore[union-attr]
        # Something else has changed one of them: all are added by autograd then.
        weights[1].grad = torch.ones(5)
        Replay.apply(torch.tensor(1.0), *weights).backward(torch.tensor(1.0))
        assert torch.equal(held(), torch.cat([torch.arange(12.0) * 9, torch.arange(12.0, 17.0) + 1]))
        for weight in weights:
            weight.grad = None
