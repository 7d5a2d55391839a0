"""Work on pictures that is recorded once and then replayed (CUDA graphs).

A tower's layers with adapters are thousands of small pieces of GPU work, which the CPU can hardly start as fast as the
GPU does them. Packs follow each other, so that one recording at a time is in use and all share their memory (which
torch does not count in `max_memory_allocated`: what a replay uses is nobody's tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

STEP = 2
"""Numbers of pictures that have a recording of their own: multiples of this. The missing ones are black."""
WARM_UP = 2
"""Runs before the recording: the first ones build and choose kernels."""


class Recorded:
    """A function of pictures, with learning weights, that replays its work; inputs learn nothing.

    `refresh` is called before each run: what the function reads that is made of the weights must be made in its place.
    """

    def __init__(
        self,
        run: Callable[[Float[Tensor, "images ..."]], Float[Tensor, "images ..."]],
        weights: Sequence[nn.Parameter],
        refresh: Callable[[], None],
    ) -> None:
        self._run = run
        self._weights = weights
        self._refresh = refresh
        self._recordings: dict[int, _Recording] = {}
        self._memory: Any = None

    def __call__(self, images: Float[Tensor, "images ..."]) -> Float[Tensor, "images ..."]:
        """Return what the function returns; its result and gradients are to be used before the next call."""
        self._refresh()
        count = -(-len(images) // STEP) * STEP
        if count not in self._recordings:
            self._make_room(count)
            sample = images.new_zeros(count, *images.shape[1:])
            self._recordings[count] = _Recording(self._run, self._weights, sample, self._memory)
        return _Replay.apply(self._recordings[count], images, *self._weights)

    def _make_room(self, count: int) -> None:
        """Begin anew where no recording is as large: small ones fit in the memory of the largest, not it in theirs."""
        if count > max(self._recordings, default=0):
            torch.cuda.synchronize()
            self._recordings.clear()
            self._memory = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()


class _Recording:
    def __init__(self, run: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], sample: Tensor, memory: Any):
        self.images = sample
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                _run_both_ways(run, weights, sample)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()  # what the warm-up took belongs to its stream, of use to no other work
        # Other threads may talk to the GPU meanwhile: the loader puts pictures in pinned memory.
        settings: Any = {"pool": memory, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **settings):
            outputs = run(sample)
        self.to_outputs = torch.zeros_like(outputs)
        with torch.cuda.graph(self.backward, **settings):
            self.gradients = torch.autograd.grad(outputs, weights, self.to_outputs)
        self.outputs = outputs.detach()


def _run_both_ways(run: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], sample: Tensor) -> None:
    outputs = run(sample)
    torch.autograd.grad(outputs, weights, torch.zeros_like(outputs))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, images: Tensor, *_weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.recording, ctx.count = recording, len(images)
        recording.images[: len(images)].copy_(images)
        recording.images[len(images) :].zero_()
        recording.forward.replay()
        return recording.outputs[: len(images)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recording = ctx.recording
        recording.to_outputs[: ctx.count].copy_(gradient)
        recording.to_outputs[ctx.count :].zero_()
        recording.backward.replay()
        # The next replay writes over these, and a first gradient would be kept as it is.
        copies = torch._foreach_mul(recording.gradients, 1.0)  # pyright: ignore[reportPrivateImportUsage]
        return None, None, *copies
