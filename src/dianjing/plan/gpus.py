"""GPUs people train on, by their data sheets, with the one of this machine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from dianjing.config.fields import nearest
from dianjing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: what the data sheet says, dense products with sums in fp32."""

    name: str
    gib: float
    """Memory that a program sees; less than the name says where error correction takes a part."""
    bf16: float = math.nan
    """TFLOP/s."""
    fp8: float = 0.0
    """TFLOP/s; 0 = no FP8 units."""
    bandwidth: float = math.nan
    """TB/s of its memory."""

    @property
    def num_bytes(self) -> int:
        """Its memory."""
        return int(self.gib * 2**30)


GPUS = tuple(
    Gpu(name=name, gib=gib, bf16=bf16, fp8=fp8, bandwidth=bandwidth)
    for name, gib, bf16, fp8, bandwidth in (
        ("H200", 139.8, 989, 1979, 4.8),
        ("H100", 79.1, 989, 1979, 3.35),
        ("H100 PCIe", 79.1, 756, 1513, 2.0),
        ("H20", 95.1, 148, 296, 4.0),
        ("A100 80GB", 79.2, 312, 0, 2.04),
        ("A100 40GB", 39.4, 312, 0, 1.56),
        ("L40S", 44.4, 362, 733, 0.864),
        ("RTX A6000", 47.5, 155, 0, 0.768),
        ("L4", 22.0, 121, 242, 0.3),
        ("A10", 22.0, 125, 0, 0.6),
        ("RTX 5090", 31.4, 209.5, 419, 1.79),
        ("RTX 4090", 23.6, 165, 330, 1.01),
        ("RTX 3090", 23.6, 71, 0, 0.936),
    )
)
WITHOUT_BF16 = ("V100", "T4", "P100", "P40", "RTX 2080 Ti", "Quadro RTX 8000", "GTX 1080 Ti", "Titan RTX")


def find_gpu(name: str) -> Gpu:
    """Return the GPU that a user names; "4090" and "a100-80gb" will do.

    Raises:
        ConfigError: it is not in the table, or has no bf16 units.
    """
    asked = _words(name)
    names = [gpu.name for gpu in GPUS]
    found = [gpu for gpu in GPUS if _words(gpu.name) == asked] or [gpu for gpu in GPUS if asked <= _words(gpu.name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"--gpu {name}: which one, {' or '.join(gpu.name for gpu in found)}?")
    if any(asked <= _words(old) for old in WITHOUT_BF16):
        raise ConfigError(
            f"--gpu {name}: it computes no bf16, which training on a GPU needs here; GPUs from Ampere (2020) on do"
        )
    offer = "".join(f"; did you mean '{other}'?" for other in nearest(name, names))
    raise ConfigError(
        f"--gpu {name}: not in the table ({', '.join(names)}){offer}; for another GPU give --memory GIB, and --tflops "
        "(bf16, dense, by its data sheet) for its speed"
    )


def any_gpu(gib: float, tflops: float | None) -> Gpu:
    """Return a GPU of which only this is known; its bandwidth is in proportion to its speed, as an H200's."""
    speed = math.nan if tflops is None else tflops
    return Gpu(name=f"{gib:g} GiB", gib=gib, bf16=speed, bandwidth=speed * GPUS[0].bandwidth / GPUS[0].bf16)


def gpu_here() -> Gpu | None:
    """Return the GPU of this machine with the memory it really has; without a speed if it is not in the table."""
    import torch  # slow to import

    if not torch.cuda.is_available():
        return None
    name, size = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    words = _words(name)
    known = [gpu for gpu in GPUS if _words(gpu.name) <= words and "laptop" not in words]
    # "NVIDIA A100-SXM4-80GB" has the words of one entry, "NVIDIA H100 PCIe" those of two.
    best = max(known, key=lambda gpu: len(_words(gpu.name)), default=Gpu(name=name, gib=size))
    return replace(best, gib=size)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower())) - {"nvidia", "geforce"}
