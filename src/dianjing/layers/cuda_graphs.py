"""Work on pictures that is recorded once and then replayed (CUDA graphs).

A tower's layers with adapters are thousands of small pieces of GPU work, which the CPU can hardly start as fast as the
GPU does them. Packs follow each other, so that one recording at a time is in use and all share their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

WARM_UP = 2
"""Runs before the recording: the first ones build and choose kernels."""
ROOM = 8
"""There are places for a multiple of so many pictures."""


class Recorded:
    """A function of pictures, with learning weights, that replays its work; inputs learn nothing.

    Each number of pictures has a recording of its own; all work in the same memory. `refresh` is called before each
    run: what the function reads that is made of the weights must be made in its place.
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
        self._places: _Places | None = None

    def __call__(self, images: Float[Tensor, "images ..."]) -> Float[Tensor, "images ..."]:
        """Return what the function returns; its result and gradients are to be used before the next call."""
        self._refresh()
        count = len(images)
        if count not in self._recordings:
            if self._places is None or count > len(self._places.images):
                self._places = _Places(images, self._weights, self._places)
            try:
                self._recordings[count] = _Recording(self._run, self._weights, count, self._places)
            except BaseException:
                if not self._recordings:
                    self._places = None  # torch records nothing more in memory that held one recording, now gone
                raise
        return _Replay.apply(self._recordings[count], images, *self._weights)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that tensors on the GPU have taken, and beside it what recordings work in.

    torch does not count that: what a replay uses is nobody's tensor.
    """
    pools = [segment for segment in torch.cuda.memory_snapshot() if any(segment["segment_pool_id"])]
    uncounted = sum(segment["total_size"] - segment["allocated_size"] for segment in pools)
    return torch.cuda.max_memory_allocated(device) + uncounted


class _Places:
    """What recordings read and write, for as many pictures as are given and some more, and the memory they work in.

    Recordings with more pictures take larger places; all else stays that of the places `before`.
    """

    def __init__(self, images: Tensor, weights: Sequence[nn.Parameter], before: _Places | None) -> None:
        self.images = images.new_zeros(-(-len(images) // ROOM) * ROOM, *images.shape[1:])
        self.gradients = before.gradients if before else _Gradients(weights)
        self.memory: Any = before.memory if before else torch.cuda.graph_pool_handle()
        # One for all: torch keeps memory for the matrix products of each stream that has had any.
        self.aside = before.aside if before else torch.cuda.Stream()
        self._outputs: Tensor | None = None

    def outputs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return where results like these are written to, and where their gradient is read."""
        if self._outputs is None:
            shape = 2, len(self.images), *like.shape[1:]
            self._outputs = torch.zeros(shape, dtype=like.dtype, device=self.images.device)
        result, gradient = self._outputs
        return result[: len(like)], gradient[: len(like)]


class _Gradients:
    """The gradients of all weights, one after the other in memory."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        self._weights = weights
        self.newest = torch.empty(sum(weight.numel() for weight in weights), device=weights[0].device)
        """Those of the newest replay; the next one writes over them."""
        self._sum: Tensor | None = None
        """Those of a step's packs up to now, parts of which the weights hold as their gradients."""
        self._held: list[int] = []
        """Where in memory these parts are."""

    def add(self) -> list[Tensor | None]:
        """Return what autograd is to add to the weights' gradients: nothing where it has been added already."""
        gradients = [weight.grad for weight in self._weights]
        held = [None if gradient is None else gradient.data_ptr() for gradient in gradients]
        if self._sum is not None and held == self._held:
            self._sum += self.newest
            return [None] * len(gradients)
        self._sum = self.newest.clone()
        parts = self._sum.split([weight.numel() for weight in self._weights])
        self._held = [part.data_ptr() for part in parts]
        return [part.view_as(weight) for part, weight in zip(parts, self._weights, strict=True)]


class _Recording:
    def __init__(
        self, run: Callable[[Tensor], Tensor], weights: Sequence[nn.Parameter], count: int, places: _Places
    ) -> None:
        self.images, self.gradients = places.images[:count], places.gradients
        places.aside.wait_stream(torch.cuda.current_stream())
        like, kept = self.images, 0
        # What warming up draws is drawn again after it: where a recording is made must not change what is trained.
        with torch.cuda.stream(places.aside), torch.random.fork_rng([self.images.device]):
            for _ in range(WARM_UP):
                before = torch.cuda.memory_allocated()
                outputs = run(self.images)
                kept = torch.cuda.memory_allocated() - before
                torch.autograd.grad(outputs, weights, torch.zeros_like(outputs))
                like = torch.empty_like(outputs, device="meta")
                del outputs
        torch.cuda.current_stream().wait_stream(places.aside)
        if torch.cuda.mem_get_info()[0] < 2 * kept:
            torch.cuda.empty_cache()  # what the warm-up took belongs to its stream; none is given back while recording
        self.outputs, self.to_outputs = places.outputs(like)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _recorded(self.forward, places):
            outputs = run(self.images)
            self.outputs.copy_(outputs.detach())
        with _recorded(self.backward, places):
            gradients = torch.autograd.grad(outputs, weights, self.to_outputs)
            torch.cat([gradient.flatten() for gradient in gradients], out=self.gradients.newest)
            del gradients, outputs


@contextmanager
def _recorded(graph: torch.cuda.CUDAGraph, places: _Places) -> Iterator[None]:
    """Record what is done meanwhile; an error of it stays what it is, so that a step may be taken again.

    torch.cuda.graph gives all unused memory back first, for which the next pack asks anew.
    """
    torch.cuda.synchronize()
    with torch.cuda.stream(places.aside):
        # Other threads may talk to the GPU meanwhile: the loader puts pictures in pinned memory.
        graph.capture_begin(pool=places.memory, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, images: Tensor, *_weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.recording = recording
        recording.images.copy_(images)
        recording.forward.replay()
        return recording.outputs.view_as(recording.outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        recording: _Recording = ctx.recording
        recording.to_outputs.copy_(gradient)
        recording.backward.replay()
        return None, None, *recording.gradients.add()
