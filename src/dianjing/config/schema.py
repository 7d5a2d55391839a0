"""The recipe of a run: one dataclass for each of its sections, each field with its unit, its range and its default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

Stage = Literal["pretrain", "finetune"]
Tuning = Literal["frozen", "lora", "full"]
Quantization = Literal["", "nf4", "fp8"]
OnBad = Literal["error", "skip"]
ProjectorKind = Literal["mlp", "pixel_shuffle", "linear"]
Order = Literal["shuffle", "sequential", "length_grouped"]
OnLong = Literal["error", "skip", "truncate"]
EngineName = Literal["ddp", "fsdp2", "deepspeed_zero2"]
SHARDS_WEIGHTS = ("fsdp2",)
"""Engines with which no rank holds a whole model."""


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes; all are finite."""

    words: str
    """The range as an error names it: "it must be at least 0"."""
    holds: Callable[[float], bool] = field(repr=False)


NOT_NEGATIVE = Range("at least 0", lambda value: value >= 0)
Count = Annotated[int, NOT_NEGATIVE]
AtLeastOne = Annotated[int, Range("at least 1", lambda value: value >= 1)]
NotNegative = Annotated[float, NOT_NEGATIVE]
AboveZero = Annotated[float, Range("above 0", lambda value: value > 0)]
BelowOne = Annotated[float, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
Fraction = Annotated[float, Range("between 0 and 1", lambda value: 0 <= value <= 1)]


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The text LLM that gets eyes."""

    folder: str
    """Folder of a Hugging Face causal LM (InternLM2's own layout too), owner/name on the hub, or "tinyworld"."""
    template: str = ""
    """Chat template by name (`dianjing show` lists them), "own" = the tokenizer's; "" chooses it from the model."""
    tuning: Tuning = "frozen"
    """"frozen" = nothing of it trains, "lora" = adapters on its linear layers, "full" = all weights."""
    quantization: Quantization = ""
    """Storage of the decoder layers' weights, which then do not train: "nf4" (QLoRA's four bits; needs bitsandbytes),
    "fp8" (fastest on a GPU with FP8 units), or "" for the run's precision."""
    lora_rank: AtLeastOne = 64
    """Rank of the LoRA adapters."""
    lora_alpha: AboveZero = 128.0
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: BelowOne = 0.0
    """Probability of dropping an input of the adapters."""
    lora_head: bool = False
    """Also adapt the output head (XTuner does for InternLM2)."""
    lora_share_qkv: bool = False
    """q, k and v share one lora_A, which equals a LoRA on a fused wqkv (XTuner on InternLM2)."""
    learning_rate: NotNegative | None = None
    """Peak rate of this part; not given = train.learning_rate."""


@dataclass(frozen=True, kw_only=True)
class VisionTowerConfig:
    """The image encoder."""

    folder: str
    """Folder of a CLIP, SigLIP, DINOv2, DINOv3 or ViT; owner/name on the hub; or "tinyworld"."""
    feature_layer: int = -2
    """Which hidden states the projector reads, counted as Hugging Face counts them."""
    tuning: Tuning = "frozen"
    """"frozen" = nothing of it trains, "lora" = adapters on its linear layers, "full" = all weights."""
    lora_rank: AtLeastOne = 64
    """Rank of the LoRA adapters."""
    lora_alpha: AboveZero = 16.0
    """The adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: BelowOne = 0.0
    """Probability of dropping an input of the adapters."""
    learning_rate: NotNegative | None = None
    """Peak rate of this part; not given = train.learning_rate."""


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The layers between tower and LLM; trained in both stages."""

    kind: ProjectorKind = "mlp"
    """"mlp": two linear layers (LLaVA 1.5); "pixel_shuffle": the same on squares of 2 by 2 features, a quarter of the
    tokens; "linear": one layer (the first LLaVA). Only the adapter export holds the last two."""
    init_from: str = ""
    """A run to take the projector from (finetune starts from its pretrain run); "" = new, from the seed."""
    learning_rate: NotNegative | None = None
    """Peak rate of this part; not given = train.learning_rate."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records and pictures."""

    path: str | tuple[str, ...]
    """LLaVA JSON or JSONL; several files are joined in the order given."""
    images: str = ""
    """Folder that the records' `image` paths are relative to; "" = the folder of the data file."""
    aspect: Literal["pad", "crop"] = "pad"
    """"pad" to a square first (LLaVA's finetune), or "crop" the centre (LLaVA's pretrain)."""
    transparency: Literal["white", "drop"] = "white"
    """Transparent pictures: "white" lays them on white; "drop" ignores the alpha channel (XTuner and LLaVA)."""
    white: Count = 0
    """The value that is white in pictures of more than 8 bits which do not name it themselves, such as 4095 for 12
    bits (`dianjing check` proposes it); 0 = they use their whole range."""
    profiles: Literal["srgb", "ignore"] = "srgb"
    """Embedded colour profiles are applied ("srgb"), or the stored numbers are taken as they are (XTuner and LLaVA)."""
    turns: Literal["together", "both"] = "together"
    """"together": each conversation as it is; "both": also each turn alone, so that any question can come first."""
    max_tokens: AtLeastOne = 1472
    """Longest record in tokens, a picture counted as one (XTuner's max_length)."""
    on_long_record: OnLong = "error"
    """Records longer than max_tokens: stop with an error, skip them, or truncate them. The run counts each kind."""
    on_bad_record: OnBad = "error"
    """Records and pictures that cannot be used: stop with an error, or skip them, counted and named."""
    pack_tokens: AtLeastOne = 4096
    """Most positions (pictures expanded) in one forward pass; records share a pack without seeing each other."""
    order: Order = "shuffle"
    """"shuffle" = a new random order each epoch, "sequential" = the file's, "length_grouped" = batches of similar
    lengths, records with pictures apart from those without (XTuner's finetune)."""
    held_out: str = ""
    """LLaVA JSON with records that are not trained on: their loss is measured during the run (train.probe_every), and
    the checkpoint at which it was lowest is kept as well."""
    workers: int = -1
    """Processes that decode pictures for the training process; -1 = chosen by the number of cores when training on a
    GPU, none on a CPU."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimizer, the schedule, and the files written during training."""

    learning_rate: NotNegative = 1e-3
    """Peak rate of AdamW, for all parts without a rate of their own."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay, on all weights that train."""
    clip_norm: NotNegative = 1.0
    """Largest gradient norm; 0 = no clipping."""
    warmup_ratio: Fraction = 0.03
    """Share of the optimizer steps in which the rate rises linearly; then a cosine to zero."""
    epochs: AtLeastOne = 1
    """Passes over the data."""
    max_steps: Count = 0
    """Stop after this many optimizer steps; 0 = all epochs. The schedule ends there too."""
    global_batch_size: AtLeastOne = 16
    """Records in one optimizer step, over all ranks and packs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; "auto" = bf16 on a GPU that has it, on a CPU whichever is faster
    there, measured when the run begins."""
    engine: EngineName = "ddp"
    """How several GPUs share the work: "ddp" = a whole model on each; "fsdp2" = a shard on each; "deepspeed_zero2" =
    whole weights, sharded gradients and optimizer state. Memory needed differs, results do not."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Keep only each layer's input and compute the rest again: less memory, a third more time, the same result.
    "auto" = when the run would not fit the GPU's free memory without; off on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use fused layers, and compile those that have no fused form (about a minute); "auto" = on a GPU."""
    log_every: AtLeastOne = 10
    """Optimizer steps between two log lines."""
    save_every: AtLeastOne = 500
    """Optimizer steps between two checkpoints; one is always written at the end."""
    keep: AtLeastOne = 2
    """Newest checkpoints kept on disk."""
    probe_every: int = 0
    """Optimizer steps between two measurements of the loss of a few fixed records, with the right pictures, with others
    and with none; 0 = never, -1 = as often as takes 1 % of the time."""
    stop_when: str = ""
    """"no better for N" ends the run when the held-out loss has not been lower for N steps; "" = after all steps."""
    sample_every: Count = 0
    """Optimizer steps between sample answers on held-out pictures; 0 = never."""
    sample_path: str = ""
    """LLaVA JSON with the held-out records to answer; needed when sample_every > 0."""
    sample_count: AtLeastOne = 4
    """Records answered each time."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    stage: Stage
    """"pretrain" = the projector alone trains; "finetune" = the LLM and the vision tower may train too."""
    output: str
    """Folder of the run."""
    start_from: str = ""
    """A model that sees already, which this run goes on from: a run of either stage, an export (hf, adapter), or
    another LLaVA in transformers' layout, by folder or as owner/name. It brings LLM, tower, projector and template."""
    seed: Count = 0
    """Decides the new weights, the order of the data and dropout."""
    language_model: LanguageModelConfig
    vision_tower: VisionTowerConfig
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
