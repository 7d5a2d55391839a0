"""Does llama.cpp answer from an exported GGUF pair as our own chat does, on held-out pictures of the tiny world?

    python benchmarks/gguf_answers.py [--out gguf-out] [--questions 50] [--types f32 f16 q8_0] [--scenes 1500]

The shipped tower is a CLIP, which llama.cpp computes wrongly (ggml-org/llama.cpp#25814), so a SigLIP tower is made
first: the CLIP's layers without its class token, taught for a few minutes to give the CLIP's features (a distillation);
the product's own two stages follow, and in the second it learns in full beside projector and LoRA. Every second
picture gets bars at two sides, so that it is not square. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from dianjing.config.load import load_recipe
from dianjing.demo.tiny import read_questions
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.export.gguf.llama import Request, ask_llama
from dianjing.export.gguf.proof import prompt_text
from dianjing.export.gguf.text import TEXT_FILE
from dianjing.export.gguf.vision import VISION_FILE
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids
from dianjing.infer.load import load_for_use
from dianjing.model.folders import resolve
from dianjing.pictures.image import ImageProcessor
from dianjing.tinyworld.records import DemoData, Sizes, write_demo_data
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import allowed_pairs, sample_scene
from dianjing.train.loop import train

FEATURE_LAYER = -2
ANSWER_TOKENS = 48


def write_siglip(folder: Path, steps: int, batch: int = 64, pictures: int = 3000) -> float:
    """Write a SigLIP tower that was taught the shipped CLIP's features; return its last loss (1 = knows nothing)."""
    source = resolve("tinyworld", "vision_tower")
    teacher: Any = CLIPVisionModel.from_pretrained(source, dtype=torch.float32).eval()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = SiglipVisionConfig(
        **{name: getattr(teacher.config, name) for name in sizes}, layer_norm_eps=teacher.config.layer_norm_eps
    )
    student: Any = SiglipVisionModel(config)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    with torch.no_grad():
        student.embeddings.patch_embedding.weight.copy_(teacher.embeddings.patch_embedding.weight)
        student.embeddings.patch_embedding.bias.zero_()
        student.embeddings.position_embedding.weight.copy_(teacher.embeddings.position_embedding.weight[1:])
    processor = ImageProcessor.from_folder(source)
    rng, pool = random.Random(11), allowed_pairs("train")
    pixels = torch.stack([processor(render(sample_scene(rng, pool), rng.getrandbits(32))) for _ in range(pictures)])
    loss = _teach(student, teacher, pixels, steps, batch)
    student.save_pretrained(folder)
    preprocessing = json.loads((Path(source) / "preprocessor_config.json").read_text())
    size = {"height": config.image_size, "width": config.image_size}
    siglip = {"image_processor_type": "SiglipImageProcessor", "size": size, "do_center_crop": False}
    preprocessing = {name: value for name, value in preprocessing.items() if name != "crop_size"} | siglip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return loss


def _teach(student: Any, teacher: Any, pixels: Tensor, steps: int, batch: int) -> float:
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    layers = range(teacher.config.num_hidden_layers + 1)[FEATURE_LAYER]
    loss = torch.ones(())
    for step in range(steps):
        shown = pixels[torch.randint(len(pixels), (batch,))]
        with torch.no_grad():
            wanted = teacher.pre_layrnorm(teacher.embeddings(shown))
            for layer in teacher.encoder.layers[:layers]:
                wanted = layer(wanted, None)
            wanted = wanted[:, 1:]
        given = student.embeddings(shown)
        for layer in student.encoder.layers[:layers]:
            given = layer(given, None)
        loss = (given - wanted).square().mean() / (wanted - wanted.mean((0, 1))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  distillation step {step}: relative error {loss.item():.3f}", flush=True)
    return loss.item()


def train_both(out: Path, tower: Path, data: DemoData) -> Path:
    """Train the two stages of the demo on the new tower, which learns in the second; return the run."""
    for name, path in (("pretrain", data.pretrain), ("finetune", data.finetune)):
        changes: dict[str, object] = {
            "output": str(out / name),
            "data.path": str(path),
            "data.images": str(data.images),
            "vision_tower.folder": str(tower),
            "vision_tower.feature_layer": FEATURE_LAYER,
            "train.sample_every": 0,
            "train.precision": "fp32",
        }
        if name == "finetune":
            changes |= {
                "projector.init_from": str(out / "pretrain"),
                "vision_tower.tuning": "full",
                "vision_tower.learning_rate": 1e-4,
            }
        train(load_recipe(f"tinyworld_{name}", changes))
    return out / "finetune"


def held_out(data: DemoData, number: int) -> list[tuple[Conversation, str]]:
    """Return held-out questions and their answers; every second picture has bars at two sides."""
    asked = []
    for i, question in enumerate(read_questions(data.held_out)[:number]):
        picture = Image.open(data.images / question.images[0]).convert("RGB")
        if i % 2:
            width, height = picture.size
            wide = Image.new("RGB", (width * 3 // 2, height) if i % 4 == 1 else (width, height * 3 // 2), (90, 90, 110))
            wide.paste(picture, ((wide.width - width) // 2, (wide.height - height) // 2))
            picture = wide
        asked.append((Conversation((), question.text, [picture]), question.reference))
    return asked


def measure(
    loaded: LoadedModel, folder: Path, asked: list[tuple[Conversation, str]], prepared: bool
) -> dict[str, float]:
    """Return shares of equal greedy ids and of right answers; `prepared`: the pictures are padded as in training."""
    processor = loaded.image_processor
    assert processor is not None
    conversations = [conversation for conversation, _ in asked]
    ours = generate_ids(loaded, conversations, ANSWER_TOKENS)
    requests = [
        Request(
            prompt=prompt_text(loaded, one),
            pictures=[np.asarray(processor.to_picture(processor(i)) if prepared else i) for i in one.images],
            answer=answer,
        )
        for one, answer in zip(conversations, ours, strict=True)
    ]
    replies = ask_llama(folder / TEXT_FILE, folder / VISION_FILE, requests)
    # Given the same tokens before it, each token is the same: then so is the answer when llama.cpp writes it freely.
    theirs = [reply.logits.argmax(-1).tolist() for reply in replies]
    equal = [a == b for a, b in zip(ours, theirs, strict=True)]
    right = [_text(loaded, answer) == reference for answer, (_, reference) in zip(ours, asked, strict=True)]
    square = [one.images[0].width == one.images[0].height for one in conversations]
    return {
        "equal": np.mean(equal).item(),
        "equal, square pictures": np.mean([e for e, s in zip(equal, square, strict=True) if s]).item(),
        "equal, other pictures": np.mean([e for e, s in zip(equal, square, strict=True) if not s]).item(),
        "our accuracy": np.mean(right).item(),
        # An answer with another token is another answer here, right or not, so this is a lower bound.
        "llama.cpp accuracy, at least": np.mean([r and e for r, e in zip(right, equal, strict=True)]).item(),
    }


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def main() -> None:
    """Make the model if it is not there, export it and print the table."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--out", type=Path, default=Path("gguf-out"))
    flags.add_argument("--questions", type=int, default=50)
    flags.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    flags.add_argument("--scenes", type=int, default=1500)
    flags.add_argument("--distil", type=int, default=300)
    given = flags.parse_args()
    began = time.monotonic()
    sizes = Sizes(pretrain=given.scenes, finetune=given.scenes, held_out=max(60, given.questions))
    data = write_demo_data(given.out / "data", sizes)
    run, tower = given.out / "finetune", given.out / "siglip"
    if not run.is_dir():
        if not tower.is_dir():
            print(f"relative error of the distilled tower: {write_siglip(tower, given.distil):.3f}")
        train_both(given.out, tower, data)
        print(f"made in {time.monotonic() - began:.0f} s")
    loaded = load_for_use(str(run), "cpu")
    asked = held_out(data, given.questions)
    for kind in given.types:
        folder = given.out / f"export-{kind}-{time.time_ns()}"
        proof = export(loaded, folder, [], "gguf", Options(quantize=kind, verify=True))
        print(f"{kind}: exported, {len(proof.cases)} cases, logits within {proof.max_logit_difference:.1e}")
        for name, prepared in (("prepared as in training", True), ("as they are", False)):
            shares = measure(loaded, folder, asked, prepared)
            print(f"  pictures {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in shares.items()), flush=True)


if __name__ == "__main__":
    main()
