"""Samples a second: operations over what a GPU gets done, by rows measured on one H200.

A sample's time has two parts. Large products take operations / (PRODUCTS x the data sheet's speed); what is left of the
measured time (norms, rotations, attention, masks, adapters, the loss) moves memory, and goes with its bandwidth.
"""

from __future__ import annotations

import math
from typing import Literal

from dianjing.config.schema import Recipe
from dianjing.plan.flops import Flops
from dianjing.plan.gpus import GPUS, Gpu
from dianjing.plan.shapes import Shapes

H200 = GPUS[0]
PRODUCTS = 0.75
"""Share of the data sheet's speed in large products: 739 of 989 TFLOP/s, bf16."""
SHARES: dict[Literal["frozen", "lora", "full"], float] = {
    "frozen": 133.2 * 4.106 / 989,
    "lora": 63.6 * 8.682 / 989,
    "full": 46.2 * 8.682 / 989,
}
"""Share of it that a whole run reaches, by how the LLM is tuned: samples/s times operations, measured
(benchmarks/results/2026-11-29-third); full tuning was not, and is taken to be like LoRA was in compiled layers."""
NF4_SLOWER = 1.15
"""Four-bit weights are undone before each product."""
DECODER_LAUNCH, TOWER_LAUNCH, TOWER_READ = 4.2e-3, 3.7e-3, 0.6e-3
"""Seconds a CPU needs to start one layer's work for a pack: decoder and tower that learn, tower that is only read."""
SCALING = 0.97
"""Of N times one GPU's speed, with N of them."""


def samples_per_second(
    flops: Flops,
    shapes: Shapes,
    recipe: Recipe,
    gpu: Gpu,
    *,
    checkpointing: bool,
    records: int,
    packs: int,
    gpus: int = 1,
) -> float:
    """Return the samples that `gpus` GPUs get done in a second; nan if its speed is not known, or the run is in fp32.

    A step has `records` over all GPUs, in `packs` packs on each. Few records a pack leave a GPU waiting for its CPU:
    a step takes no less than it takes to start.
    """
    llm = recipe.language_model
    again = flops.again if checkpointing else 0.0
    share = SHARES[llm.tuning]
    fp8 = flops.frozen * (1.5 if checkpointing else 1) if llm.quantization == "fp8" and gpu.fp8 else 0.0
    done = flops.useful + again
    products = (done - fp8) / gpu.bf16 + (fp8 / gpu.fp8 if fp8 else 0.0)
    rest = done * (1 / share - 1 / PRODUCTS) / H200.bf16 * (H200.bandwidth / gpu.bandwidth)
    seconds = (products / PRODUCTS + rest) / 1e12 * (NF4_SLOWER if llm.quantization == "nf4" else 1)
    step = seconds * records / gpus
    if math.isnan(step) or recipe.train.precision == "fp32":
        return math.nan
    return min(records / step, most_started(shapes, recipe, records=records, packs=packs)) * (
        SCALING if gpus > 1 else 1
    )


def most_started(shapes: Shapes, recipe: Recipe, *, records: int, packs: int) -> float:
    """Return the samples a second that a CPU can start the work for; GPUs that are faster wait for it."""
    tower = TOWER_READ if recipe.vision_tower.tuning == "frozen" else TOWER_LAUNCH
    return records / (packs * (shapes.layers * DECODER_LAUNCH + shapes.tower_layers * tower))
