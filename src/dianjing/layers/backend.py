"""One place that chooses what computes an operator: torch's own operators, or a Triton kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def uses_kernels(x: Tensor) -> bool:
    """Return whether operators on this tensor run as Triton kernels."""
    return x.is_cuda


def has_kernel(subject: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that runs the function of the same name in kernels/`subject`.py for tensors on a GPU.

    The first argument, a tensor, decides. The decorated function says in torch's operators what the kernel computes,
    and is what the kernel is tested against.
    """

    def decorate(in_torch: Callable[P, R]) -> Callable[P, R]:
        @cache
        def kernel() -> Any:  # imported at the first call: builds of torch for CPUs come without Triton
            return getattr(import_module(f"dianjing.layers.kernels.{subject}"), in_torch.__name__)

        @wraps(in_torch)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            x: Any = args[0]
            return (kernel() if uses_kernels(x) else in_torch)(*args, **kwargs)

        return run

    return decorate
