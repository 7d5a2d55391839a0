"""CUDA graphs of a vision tower: the GPU work of both passes, captured once and then replayed.

A tower's layers with adapters are thousands of small kernels, which the CPU can hardly start as fast as the GPU runs
them. One pack follows the other, so that only one graph is in use at a time and all graphs share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

WARM_UP = 2
"""Runs before the capture: the first ones build and choose kernels."""
MULTIPLE = 8
"""Buffers have room for a multiple of this many pictures."""


class CudaGraphs:
    """A function of pictures, with weights that train, whose GPU work is replayed; the pictures get no gradient.

    Each number of pictures has graphs of its own; all share their memory. `refresh` is called before each replay: it
    must update, in place, what the function reads that is made from the weights.
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
        self._graphs: dict[int, _Graphs] = {}
        self._buffers: _Buffers | None = None

    def __call__(self, images: Float[Tensor, "images ..."]) -> Float[Tensor, "images ..."]:
        """Return the function's result; the next call overwrites it and the gradients."""
        self._refresh()
        count = len(images)
        if count not in self._graphs:
            if self._buffers is None or count > len(self._buffers.images):
                self._buffers = _Buffers(images, self._weights, self._buffers)
            try:
                self._graphs[count] = _Graphs(self._run, self._weights, count, self._buffers)
            except BaseException:
                if not self._graphs:
                    self._buffers = None  # torch captures nothing more in memory whose only graph is gone
                raise
        return _Replay.apply(self._graphs[count], images, *self._weights)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that tensors on the GPU have taken, plus the memory that CUDA graphs work in.

    torch does not count the latter: what a replay uses belongs to no tensor.
    """
    pools = [segment for segment in torch.cuda.memory_snapshot() if any(segment["segment_pool_id"])]
    uncounted = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
    return torch.cuda.max_memory_allocated(device) + uncounted


class _Buffers:
    """The tensors that graphs read and write, with room for the pictures given and some more, and their memory pool.

    Graphs of more pictures need larger buffers; all but the pictures is then shared with the buffers `before`.
    """

    def __init__(self, images: Tensor, weights: Sequence[nn.Parameter], before: _Buffers | None) -> None:
        self.images = images.new_zeros(-(-len(images) // MULTIPLE) * MULTIPLE, *images.shape[1:])
        self.gradients = before.gradients if before else _GradientBuffer(weights)
        self.pool: Any = before.pool if before else torch.cuda.graph_pool_handle()
        # One for all graphs: torch keeps a workspace for each stream that has run a GEMM.
        self.stream = before.stream if before else torch.cuda.Stream()
        self._outputs: Tensor | None = None

    def outputs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return where results like these are written, and where their gradient is read."""
        if self._outputs is None:
            shape = 2, len(self.images), *like.shape[1:]
            self._outputs = torch.zeros(shape, dtype=like.dtype, device=self.images.device)
        result, gradient = self._outputs
        return result[: len(like)], gradient[: len(like)]


class _GradientBuffer:
    """The gradients of all weights, in one piece of memory."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = weights
        self.newest = torch.empty(sum(weight.numel() for weight in weights), device=weights[0].device)
        """Those of the newest replay; the next one overwrites them."""
        self._sum: Tensor | None = None
        """Those of a step's packs so far; the weights hold views of it as their gradients."""
        self._held: list[int] = []
        """Where in memory these views are."""

    def add(self) -> list[Tensor | None]:
        """Return the gradients for autograd to add, or None for each if they have been added here already."""
        gradients = [weight.grad for weight in self._weights]
        held = [None if gradient is None else gradient.data_ptr() for gradient in gradients]
        if self._sum is not None and held == self._held:
            self._sum += self.newest
            return [None] * len(gradients)
        self._sum = self.newest.clone()
        parts = self._sum.split([weight.numel() for weight in self._weights])
        self._held = [part.data_ptr() for part in parts]
        return [part.view_as(weight) for part, weight in zip(parts, self._weights, strict=True)]


class _Graphs:
    """The graphs of both passes for one number of pictures."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], count: int, buffers: _Buffers
    ) -> None:
        self.images, self.gradients = buffers.images[:count], buffers.gradients
        buffers.stream.wait_stream(torch.cuda.current_stream())
        like, kept = self.images, 0
        # The random numbers that warming up draws are drawn again: when graphs are captured must not change a run.
        with torch.cuda.stream(buffers.stream), torch.random.fork_rng([self.images.device]):
            for _ in range(WARM_UP):
                before = torch.cuda.memory_allocated()
                outputs = run(self.images)
                kept = torch.cuda.memory_allocated() - before
                torch.autograd.grad(outputs, weights, torch.zeros_like(outputs))
                like = torch.empty_like(outputs, device="meta")
                del outputs
        torch.cuda.current_stream().wait_stream(buffers.stream)
        if torch.cuda.mem_get_info()[0] < 2 * kept:
            torch.cuda.empty_cache()  # what the warm-up took belongs to its stream, and none is freed during a capture
        self.outputs, self.d_outputs = buffers.outputs(like)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with capture(self.forward, buffers.pool, buffers.stream):
            outputs = run(self.images)
            self.outputs.copy_(outputs.detach())
        with capture(self.backward, buffers.pool, buffers.stream):
            gradients = torch.autograd.grad(outputs, weights, self.d_outputs)
            torch.cat([gradient.flatten() for gradient in gradients], out=self.gradients.newest)
            del gradients, outputs


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """Capture what runs inside; an error raised there is passed on unchanged, so that the step can be retried.

    Not torch.cuda.graph: it frees all unused memory first, which the next pack must then allocate again.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Other threads may use the GPU meanwhile: the loader puts pictures in pinned memory.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()


class _Replay(torch.autograd.Function):
    """Y = f(images); backward replays the gradients of the weights from dY. Keeps nothing: the graphs do."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, images: Tensor, *_weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.graphs = graphs
        graphs.images.copy_(images)
        graphs.forward.replay()
        return graphs.outputs.view_as(graphs.outputs)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        graphs: _Graphs = ctx.graphs
        graphs.d_outputs.copy_(dY)
        graphs.backward.replay()
        return None, None, *graphs.gradients.add()
