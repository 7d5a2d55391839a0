"""The memory of a GPU that a run takes, part by part, from shapes alone.

What a layer keeps for its backward pass was counted in the layers themselves, plain, compiled and fused (autograd's
saved tensors, tests/unit/plan/test_memory.py); the sums were held against the peaks measured on a GPU (docs/plan.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dianjing.config.schema import Recipe
from dianjing.plan.lengths import Lengths, step_records
from dianjing.plan.weights import Adapters, Weights

CONTEXT_BYTES = 3 * 2**28
"""CUDA's context and the workspaces of its libraries: what a process takes before its first tensor, about 0.75 GiB."""
SPARE = 0.04
"""Of what tensors take: memory in pieces that are too small to be of use."""
OVERHEAD = "CUDA, and room to spare"


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The heaviest forward and backward pass of a run."""

    tokens: int
    pictures: int
    supervised: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by part."""

    parts: Mapping[str, int]

    @property
    def tensors(self) -> int:
        """All but CUDA's own."""
        return sum(size for part, size in self.parts.items() if part != OVERHEAD)

    @property
    def total(self) -> int:
        """The memory that the GPU must have."""
        return sum(self.parts.values())


def heaviest_pack(recipe: Recipe, lengths: Lengths, gpus: int = 1) -> Pack:
    """Return the pack that takes the most memory of those that records of such lengths can make."""
    most = -(-step_records(recipe, lengths) // gpus) * (lengths.longest or recipe.data.pack_tokens)
    tokens = min(recipe.data.pack_tokens, most)  # packs are even (data/pack.py), but full in some steps
    return Pack(
        tokens=tokens,
        pictures=math.ceil(tokens * lengths.picture_share),
        supervised=int(tokens * lengths.supervised_share) + 1,
    )


def memory(
    weights: Weights, recipe: Recipe, lengths: Lengths, *, checkpointing: bool, compiled: bool = True, gpus: int = 1
) -> Memory:
    """Return what a run takes at its peak, in the backward pass of its heaviest pack."""
    pack = heaviest_pack(recipe, lengths, gpus)
    size = 4 if recipe.train.precision == "fp32" else 2
    shapes = weights.shapes
    decoder_layer = pack.tokens * size * _decoder_elements(weights, recipe, compiled=compiled, size=size)
    tower_layer = pack.pictures * shapes.positions * size * _tower_elements(weights, recipe, compiled, size)
    stream = pack.tokens * size * shapes.hidden
    tower_stream = pack.pictures * shapes.positions * size * shapes.tower_width
    learns = recipe.vision_tower.tuning != "frozen"
    if checkpointing:
        kept = shapes.layers * stream + decoder_layer  # of one layer everything is there again, in its turn
        seen = (shapes.tower_layers * tower_stream + tower_layer) * learns
    else:
        # The last layer computes its second half at supervised rows alone (model/forward.py).
        half = pack.tokens * size * (4 * shapes.hidden + 2 * (shapes.heads + shapes.kv_heads))
        kept = (shapes.layers - 1) * decoder_layer + half
        seen = shapes.tower_layers * tower_layer * learns
    projected = shapes.patches * shapes.tower_width + 3 * shapes.image_tokens * shapes.hidden
    seen += pack.pictures * size * projected
    head = size * pack.supervised * shapes.vocabulary  # the gradient is written over the logits
    between = 2 * shapes.mlp
    if compiled and weights.fused_decoder:
        # The gradients of gates lie where the gates were. Attention's: in fp32 for queries, for keys and values as many
        # as there are queries, and what arrives and leaves.
        eight = recipe.language_model.quantization == "fp8"
        between = max((1 + eight) * shapes.mlp, 6 * shapes.heads + 2 * shapes.kv_heads)
    backward = (between + 2 * shapes.hidden) * pack.tokens * size
    parts = _held(weights, recipe, gpus) | {
        "copies of what trains, for bf16": _copies(weights, recipe, checkpointing, size),
        "the tower with its adapters added, for gradients": _sums(weights, recipe, compiled, size),
        "activations of the LLM": int(kept + 2 * stream),
        "activations of tower and projector": int(seen),
        "output head, or one layer's backward pass": max(head, backward),
    }
    parts = {name: taken for name, taken in parts.items() if taken}
    return Memory({**parts, OVERHEAD: int(CONTEXT_BYTES + SPARE * sum(parts.values()))})


def _held(weights: Weights, recipe: Recipe, gpus: int) -> dict[str, int]:
    """Return what weights, gradients and optimizer take on each GPU."""
    engine, fp32 = recipe.train.engine, 4 * weights.num_trainable
    share = 1 / gpus
    whole = {"ddp": (1, 1, 1), "deepspeed_zero2": (1, share, share)}.get(engine, (share, share, share))
    frozen = {f"frozen weights ({kind})": size * whole[0] for kind, size in weights.frozen_bytes.items()}
    buckets = {"ddp": fp32 if gpus > 1 else 0, "deepspeed_zero2": fp32 * share}.get(engine, 0)
    gathered = 2 * weights.layer_bytes if whole[0] < 1 else 0
    held = frozen | {
        "weights that train (fp32)": fp32 * whole[0],
        "gradients (fp32)": fp32 * whole[1],
        "optimizer: AdamW's two means (fp32)": 2 * fp32 * whole[2],
        "buckets and partitions of the engine": buckets,
        "layers gathered from other GPUs": gathered,
    }
    return {name: int(taken) for name, taken in held.items()}


def _copies(weights: Weights, recipe: Recipe, checkpointing: bool, size: int) -> int:
    """Return what weights in bf16 take that are made of fp32 ones for the products, and kept for the backward pass."""
    if size == 4:
        return 0
    copied = 0
    for part, section in (("language_model", recipe.language_model), ("vision_tower", recipe.vision_tower)):
        # Autocast keeps its copies until the forward pass ends, fused layers for good; a checkpointed layer of another
        # kind makes its adapters' again.
        fused = weights.fused_decoder if part == "language_model" else weights.fused_tower
        if section.tuning == "full" or fused or not checkpointing:
            copied += weights.trainable[part]
    return size * (copied + weights.trainable["projector"])


def _sums(weights: Weights, recipe: Recipe, compiled: bool, size: int) -> int:
    """Return what the sums W + s B A of a fused tower take (layers/fused/linear.py: `for_cuda_graph`)."""
    shapes, tower = weights.shapes, recipe.vision_tower
    if not (compiled and weights.fused_tower and tower.tuning == "lora" and not tower.lora_dropout):
        return 0
    return size * shapes.tower_layers * (4 * shapes.tower_width**2 + 2 * shapes.tower_width * shapes.tower_mlp)


def _decoder_elements(weights: Weights, recipe: Recipe, *, compiled: bool, size: int) -> float:
    """Return how many numbers a decoder layer keeps for each token."""
    shapes, tuning = weights.shapes, recipe.language_model.tuning
    hidden, mlp = shapes.hidden, shapes.mlp
    heads = shapes.heads + shapes.kv_heads
    # Both residuals; queries, keys, values and attention's answer; gate and up.
    kept: float = 2 * hidden + 2 * heads + 2 * mlp
    if compiled and weights.fused_decoder:
        # With FP8 weights, attention's answers twice: in its own order, and in that of the tokens.
        entering = 2 * hidden + shapes.heads * (recipe.language_model.quantization == "fp8")
        qkv = shapes.heads + 2 * shapes.kv_heads  # as they were before their norm
        return kept + qkv * weights.qk_norm + (tuning != "frozen") * entering + weights.decoder.ranks
    if not compiled:
        kept += 2 * hidden + mlp  # norms take their inputs in fp32; the gate after its activation
    if tuning != "frozen":
        kept += 2 * hidden + mlp  # what the linear layers multiply
    if tuning == "full" and not compiled:
        kept += 4 * hidden + 2 * heads  # norms answer in fp32, and so do rotated queries and keys
    again = 2 * hidden + (mlp if compiled else 0)
    return kept + _adapter_elements(weights.decoder, recipe.language_model.lora_dropout, again, size)


def _tower_elements(weights: Weights, recipe: Recipe, compiled: bool, size: int) -> float:
    """Return how many numbers a tower layer that learns keeps for each position."""
    width, mlp = weights.shapes.tower_width, weights.shapes.tower_mlp
    if compiled and weights.fused_tower:
        return 8 * width + mlp + weights.tower.ranks
    kept: float = 6 * width + mlp + 2 * width + mlp + (0 if compiled else mlp)
    if recipe.vision_tower.tuning == "full" and not compiled:
        kept += 4 * width
    again = 2 * width + (mlp if compiled else 0)
    return kept + _adapter_elements(weights.tower, recipe.vision_tower.lora_dropout, again, size)


def _adapter_elements(adapters: Adapters, dropout: float, again: float, size: int) -> float:
    """Return what LoRA keeps: its inner products; with dropout each input of its own, and its mask in bytes.

    `again` are the inputs that need not be kept then.
    """
    dropped = adapters.inputs * (1 + 1 / size) - again if dropout and adapters.inputs else 0.0
    return adapters.ranks + dropped
