"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Mapping

from dianjing.benchmark.item import Benchmark
from dianjing.benchmark.mmbench import MMBENCH, OWN
from dianjing.benchmark.options import AI2D, MMMU, SCIENCEQA, SEED
from dianjing.benchmark.refcoco import REFCOCO
from dianjing.benchmark.vqa import CHARTQA, GQA, TEXTVQA, VIZWIZ, VQAV2
from dianjing.benchmark.yes_no import MME, POPE

BENCHMARKS: Mapping[str, Benchmark] = {
    "mmbench": MMBENCH,
    "pope": POPE,
    "mme": MME,
    "scienceqa": SCIENCEQA,
    "seed": SEED,
    "ai2d": AI2D,
    "mmmu": MMMU,
    "gqa": GQA,
    "textvqa": TEXTVQA,
    "vqav2": VQAV2,
    "vizwiz": VIZWIZ,
    "chartqa": CHARTQA,
    "refcoco": REFCOCO,
    "choices": OWN,
}
