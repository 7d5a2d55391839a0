"""What a run is made of: one frozen dataclass a section of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["pretrain", "finetune"]
Tuning = Literal["frozen", "lora", "full"]
Frozen = Literal["", "nf4", "fp8"]
OnBad = Literal["error", "skip"]
Order = Literal["shuffle", "sequential", "length_grouped"]
OnLong = Literal["error", "skip", "truncate"]
EngineName = Literal["ddp", "fsdp2", "deepspeed_zero2"]
SHARDS_WEIGHTS = ("fsdp2",)
"""Engines with which no rank holds a whole model."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The text LLM that gets eyes."""

    folder: str
    """Folder of a Hugging Face causal LM (InternLM2's own layout too), owner/name on the hub, or "tinyworld"."""
    template: str = ""
    """Chat template by name (`dianjing show` lists them), "own" = the tokenizer's; "" chooses it from the model."""
    tuning: Tuning = "frozen"
    frozen: Frozen = ""
    """How the weights of the decoder layers are held while they do not train: "nf4" (QLoRA's four bits; needs
    bitsandbytes), "fp8" (fastest on a GPU with FP8 units), or "" for the run's precision."""
    lora_rank: int = 64
    lora_alpha: float = 128.0
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    lora_head: bool = False
    """Also adapt the output head (XTuner does for InternLM2)."""
    lora_share_qkv: bool = False
    """q, k and v share one lora_A, which equals a LoRA on a fused wqkv (XTuner on InternLM2)."""
    learning_rate: float | None = None
    """None: the run's learning_rate."""


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """The image encoder."""

    folder: str
    """Folder of a CLIP or SigLIP, or of its vision tower; owner/name on the hub; or "tinyworld"."""
    feature_layer: int = -2
    """Which hidden states the projector reads, counted as Hugging Face counts them."""
    tuning: Tuning = "frozen"
    lora_rank: int = 64
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The two-layer MLP between tower and LLM; trained in both stages."""

    init_from: str = ""
    """A run to take the projector from (finetune starts from its pretrain run); "" = new, from the seed."""
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records and pictures."""

    path: str | tuple[str, ...]
    """LLaVA JSON or JSONL; several files are joined in the order given."""
    images: str = ""
    """Folder that the records' `image` paths are relative to; "" = the folder of the data file."""
    aspect: Literal["pad", "crop"] = "pad"
    """"pad" to a square first (LLaVA's finetune), or "crop" the centre (LLaVA's pretrain)."""
    turns: Literal["together", "both"] = "together"
    """"together": each conversation as it is; "both": also each turn alone, so that any question can come first."""
    max_tokens: int = 1472
    """Longest record in tokens, a picture counted as one (XTuner's max_length)."""
    on_long_record: OnLong = "error"
    on_bad_record: OnBad = "error"
    pack_tokens: int = 4096
    """Most positions (pictures expanded) in one forward pass; records share a pack without seeing each other."""
    order: Order = "shuffle"
    """"length_grouped": batches of like length, with and without pictures apart (XTuner's finetune)."""
    workers: int = -1
    """Processes that decode pictures beside the training process; -1 = as the machine has cores when it trains on
    a GPU, none on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer, the schedule and what is written on the way."""

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    warmup_ratio: float = 0.03
    """Share of the optimizer steps in which the rate rises linearly; then a cosine to zero."""
    epochs: int = 1
    max_steps: int = 0
    """Stop after this many optimizer steps; 0 = all epochs. The schedule ends there too."""
    global_batch_size: int = 16
    """Records in one optimizer step, over all ranks and packs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; "auto" = bf16 on a GPU that has it, fp32 elsewhere."""
    engine: EngineName = "ddp"
    """How several GPUs share the work: "ddp" = a whole model on each; "fsdp2" = a shard on each; "deepspeed_zero2" =
    whole weights, sharded gradients and optimizer state. Memory needed differs, results do not."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only each layer's input and compute the rest again: less memory, a third more time, the same result.

    "auto" = when the run would not fit the GPU's free memory without; off on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Join the layers when the run starts, or compile those of unknown kinds (about a minute); "auto" = on a GPU."""
    log_every: int = 10
    """Optimizer steps between two log lines."""
    save_every: int = 500
    """Optimizer steps between two checkpoints; one is always written at the end."""
    keep: int = 2
    """Newest checkpoints kept on disk."""
    sample_every: int = 0
    """Optimizer steps between sample answers on held-out pictures; 0 = never."""
    sample_path: str = ""
    """LLaVA JSON with the held-out records to answer; needed when sample_every > 0."""
    sample_count: int = 4


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    stage: Stage
    output: str
    """Folder of the run."""
    seed: int = 0
    language_model: LanguageModelConfig
    vision_tower: VisionTowerConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
