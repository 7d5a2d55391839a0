"""A random LLM, a random CLIP tower and eight records, small enough to be made anew for each test run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
IMAGE_SIZE = 28
PATCH_SIZE = 14
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2

COLOURS = {"red": (220, 40, 40), "green": (30, 170, 60), "blue": (40, 70, 210), "black": (10, 10, 10)}
SHAPES = {"wide.png": ((60, 20), "red"), "tall.jpg": ((18, 50), "green"), "square.png": ((40, 40), "blue")}
"""Picture file -> its size and colour; "sub/small.png" is black and smaller than a patch."""


@dataclass(frozen=True)
class TinyDataset:
    """A LLaVA JSON and the folder its pictures lie in."""

    path: Path
    images: Path


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 320 tokens with InternLM2's chat marks and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [turn["value"] for record in tiny_records() for turn in record["conversations"]]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "user\n assistant\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.save_pretrained(folder)
    return fast


def write_llm(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save a Llama of two layers, 32 wide, with grouped-query attention, and its tokenizer."""
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **settings,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path, *, seed: int = 1, **settings: Any) -> Path:
    """Save a CLIP vision tower of three layers, 24 wide, four patches a picture, and its preprocessing."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": 16,
            "initializer_factor": 3.0,
            **settings,
        }
    )
    CLIPVisionModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")
    return folder


def write_siglip(folder: Path, *, seed: int = 2, **settings: Any) -> Path:
    """Save a SigLIP vision tower with its pooling head: three layers, 24 wide; its patches do not divide a picture."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 30,
            "patch_size": 8,
            **settings,
        }
    )
    SiglipVisionModel(config).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": None,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing), encoding="utf-8")
    return folder


def gentle(folder: Path, quantization: str = "", tuning: Any = None) -> dict[str, Any]:
    """Return sections of a bf16 recipe whose model has sizes that FP8 units take, and in which rounding stays small."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    llm = write_llm(folder / "llm", **sizes, initializer_range=0.05)
    clip = write_clip(folder / "clip", hidden_size=32, intermediate_size=64, initializer_factor=1.0)
    adapters = {"lora_alpha": 1, **(tuning or {})}
    return {
        "language_model": {"folder": str(llm), "quantization": quantization, **adapters},
        "vision_tower": {"folder": str(clip), **adapters},
        "train": {"precision": "bf16"},
    }


def write_images(folder: Path) -> None:
    """Draw four pictures of unlike shape: a gradient over a colour, so that no two patches are the same."""
    (folder / "sub").mkdir(parents=True)
    for name, (size, colour) in {**SHAPES, "sub/small.png": ((9, 7), "black")}.items():
        gradient = Image.linear_gradient("L").resize(size).convert("RGB")
        Image.blend(Image.new("RGB", size, COLOURS[colour]), gradient, 0.4).save(folder / name)


def tiny_records() -> list[dict[str, Any]]:
    """Return the records: one turn and several, no picture, two pictures, a picture used twice, short and long."""

    def record(name: str, image: str | list[str] | None, *turns: tuple[str, str]) -> dict[str, Any]:
        speakers = (("human", "gpt"),) * len(turns)
        messages = [
            {"from": speaker, "value": value}
            for pair, turn in zip(speakers, turns, strict=True)
            for speaker, value in zip(pair, turn, strict=True)
        ]
        pictures = {} if image is None else {"image": image}
        return {"id": name, **pictures, "conversations": messages}

    return [
        record("wide", "wide.png", ("<image>\nWhat colour is it?", "It is red.")),
        record("tall", "tall.jpg", ("<image>\nWhat colour is it?", "Green."), ("Is it wide?", "No, it is tall.")),
        record("text", None, ("What is two and three?", "Five.")),
        record("square", "square.png", ("Describe the picture.\n<image>", "A blue square, as wide as it is tall.")),
        record("two", ["wide.png", "tall.jpg"], ("Is <image> as wide as <image> is?", "No, the first is wider.")),
        record("small", "sub/small.png", ("<image>", "Black.")),
        record("again", "wide.png", ("<image>\nIs it blue?", "No."), ("Then what?", "Red."), ("Sure?", "Yes.")),
        record("chat", None, ("Hello!", "Hello! Ask me about a picture."), ("Later.", "Good.")),
    ]


def write_dataset(folder: Path) -> TinyDataset:
    """Write the records and their pictures."""
    write_images(folder / "images")
    (folder / "data.json").write_text(json.dumps(tiny_records()), encoding="utf-8")
    return TinyDataset(folder / "data.json", folder / "images")
