"""Inputs of train_speed.py and loss_parity.py: random weights at true shapes, JPEG pictures of 640x480, LLaVA JSON."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dianjing.config.schema import (
    DataConfig,
    LanguageModelConfig,
    ProjectorConfig,
    Recipe,
    TrainConfig,
    VisionTowerConfig,
)

RECORDS = 3072
STAGES: dict[int, dict[str, Any]] = {
    1: {"text": (1, 9), "text_only": 0.0, "global_batch_size": 256, "pack_tokens": 16384},
    2: {"text": (62, 416), "text_only": 0.06, "global_batch_size": 128, "pack_tokens": 15104},
}
"""Range of text tokens in a record, its share without picture. Means: 598 and 796 positions."""


def make_inputs(work: Path, *, tiny: bool) -> None:
    """Write models, pictures and records, once."""
    if (work / "made").is_file():
        return
    began = time.perf_counter()
    write_models(work, tiny=tiny)
    (work / "images").mkdir(parents=True)
    count = 64 if tiny else RECORDS
    with ProcessPoolExecutor() as processes:
        list(processes.map(write_picture, [str(work / "images")] * count, range(count), chunksize=64))
    for stage in STAGES:
        write_records(work, stage, count)
    (work / "made").touch()
    print(f"inputs made in {time.perf_counter() - began:.0f} s", flush=True)


def write_models(work: Path, *, tiny: bool) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from dianjing.model.folders import TINYWORLD, resolve

    shape: dict[str, Any] = dict(
        vocab_size=92544,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    tower: dict[str, Any] = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    if tiny:
        shape |= dict(
            vocab_size=2048,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        tower |= dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        llm, clip = LlamaForCausalLM(LlamaConfig(**shape)), CLIPVisionModel(CLIPVisionConfig(**tower))
    torch.set_default_dtype(torch.float32)
    llm.save_pretrained(work / "llm")
    clip.save_pretrained(work / "tower")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (work / "llm" / name).write_bytes((resolve(TINYWORLD, "language_model") / name).read_bytes())
    preprocessing = json.loads((resolve(TINYWORLD, "vision_tower") / "preprocessor_config.json").read_text())
    side = {"height": 336, "width": 336}
    preprocessing |= {"size": {"shortest_edge": 336}, "crop_size": side}
    (work / "tower" / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def write_picture(folder: str, number: int) -> None:
    """Save a JPEG of 640x480 with detail everywhere, about 80 kB."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((640, 480))
    noise = rng.integers(0, 24, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(np.asarray(coarse) // 2 + noise).save(Path(folder) / f"{number:05d}.jpg", quality=90)


def write_records(work: Path, stage: int, count: int) -> None:
    from dianjing.data.encode import load_tokenizer, text_ids

    tokenizer, settings = load_tokenizer(work / "llm"), STAGES[stage]
    vocabulary = [word for word in sorted(tokenizer.get_vocab()) if word.startswith("Ġ") and word[1:].isalpha()]
    words = [word for word in (" " + item[1:] for item in vocabulary) if len(text_ids(tokenizer, word)) == 1]
    rng = random.Random(stage)
    records = []
    for number in range(count):
        length = rng.randint(*settings["text"])
        text_only = rng.random() < settings["text_only"]
        asked = 0 if stage == 1 else length // 3
        question, answer = ("".join(rng.choices(words, k=k)).strip() for k in (asked, length - asked))
        record: dict[str, Any] = {"id": str(number)}
        if not text_only:
            record["image"] = f"{number:05d}.jpg"
            question = f"<image>\n{question}".strip()
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({**record, "conversations": turns})
    (work / f"stage{stage}.json").write_text(json.dumps(records), encoding="utf-8")


def recipe_of(work: Path, stage: int, *, quantization: str = "", dropout: float = 0.0, **train: Any) -> Recipe:
    tuning: Any = "frozen" if stage == 1 else "lora"
    settings = STAGES[stage]
    return Recipe(
        stage="pretrain" if stage == 1 else "finetune",
        output=str(work / "run"),
        language_model=LanguageModelConfig(
            folder=str(work / "llm"),
            tuning=tuning,
            quantization=quantization,  # type: ignore[arg-type]
            lora_rank=512,
            lora_alpha=256,
            lora_dropout=dropout,
        ),
        vision_tower=VisionTowerConfig(folder=str(work / "tower"), tuning=tuning, lora_dropout=dropout),
        projector=ProjectorConfig(),
        data=DataConfig(
            path=str(work / f"stage{stage}.json"),
            images=str(work / "images"),
            pack_tokens=settings["pack_tokens"],
            aspect="crop" if stage == 1 else "pad",
        ),
        train=TrainConfig(learning_rate=1e-3 if stage == 1 else 2e-4, save_every=10**9, log_every=1, **train),
    )
