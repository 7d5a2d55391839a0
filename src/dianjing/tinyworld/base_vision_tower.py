"""Train the tiny world's CLIP-layout vision tower from scratch (needs a GPU; minutes).

Each patch learns which phrases are true of it (SigLIP's sigmoid loss, one phrase at a time): the colour,
shape and size of the object in it, where it lies, or that it is empty. Pictures never show a held-out pair.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from dianjing.tinyworld.render import CELL, IMAGE_SIZE, UNNAMED, render
from dianjing.tinyworld.scene import COLOURS, PLACES, SHAPES, SIZES, Pairs, Scene, allowed_pairs, sample_scene

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PHRASES = (*COLOURS, *SHAPES, *SIZES, *(f"place {place}" for place in range(PLACES)), "empty")
FEATURE_LAYER = -2
"""Hidden states that the projector will read; they get the loss too, not only the last ones."""


def truths(scene: Scene) -> np.ndarray:
    """Return which phrase is true of which patch: bool (9 patches, phrases)."""
    table = np.zeros((PLACES, len(PHRASES)), dtype=bool)
    for place in range(PLACES):
        table[place, PHRASES.index(f"place {place}")] = True
    table[:, PHRASES.index("empty")] = True
    for thing in scene:
        table[thing.place, PHRASES.index("empty")] = False
        for word in (thing.colour, thing.shape, thing.size):
            if word != UNNAMED:
                table[thing.place, PHRASES.index(word)] = True
    return table


def _partly_unnamed(rng: random.Random, scene: Scene) -> Scene:
    """Give a third of the objects a colour or a shape outside the world's words.

    Like the photographs behind a real tower, they show more than the captions name; so a shape is not
    learned as a set of the colours it came in.
    """
    chance = [rng.random() for _ in scene]
    return tuple(
        replace(thing, colour=UNNAMED) if c < 0.2 else replace(thing, shape=UNNAMED) if c < 0.33 else thing
        for thing, c in zip(scene, chance, strict=True)
    )


def make_pictures(seed: int, number: int, pairs: Pairs, unnamed: bool) -> tuple[Tensor, Tensor]:
    """Draw pictures: pixels uint8 (number, 96, 96, 3) and truths bool (number, 9, phrases)."""
    rng, pool = random.Random(seed), allowed_pairs(pairs)
    pixels = np.empty((number, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    table = np.empty((number, PLACES, len(PHRASES)), dtype=bool)
    for row in range(number):
        scene = sample_scene(rng, pool)
        scene = _partly_unnamed(rng, scene) if unnamed else scene
        pixels[row] = np.asarray(render(scene, rng.getrandbits(32)))
        table[row] = truths(scene)
    return torch.from_numpy(pixels), torch.from_numpy(table)


def _config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        projection_dim=128,
        hidden_act="quick_gelu",
    )


def _normalise(values: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, device=values.device).view(3, 1, 1) for x in (MEAN, STD))
    return (values - mean) / std


def _augment(values: Tensor) -> tuple[Tensor, Tensor]:
    """Vary brightness and noise, and take the colour out of half of the pictures.

    A tower that saw every shape without colour cannot tell a shape by the colours it never came with, which
    is what reading a held-out pair needs.

    Returns:
        values (batch, 3, 96, 96) and which pictures kept their colour, bool (batch,).
    """
    batch, device = len(values), values.device
    mix = torch.rand(batch, 3, 1, 1, device=device) + 0.1
    grey = (values * mix).sum(1, keepdim=True) / mix.sum(1, keepdim=True)
    coloured = torch.rand(batch, device=device) < 0.5
    values = torch.where(coloured.view(-1, 1, 1, 1), values, grey.expand_as(values))
    values = values * torch.empty(batch, 1, 1, 1, device=device).uniform_(0.93, 1.07)
    return (values + 0.01 * torch.randn_like(values)).clamp(0, 1), coloured


def _pixels_to_unit(pixels: Tensor) -> Tensor:
    """uint8 (batch, 96, 96, 3) -> float (batch, 3, 96, 96) in 0..1."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def _loss(logits: Tensor, truth: Tensor, coloured: Tensor) -> Tensor:
    """Sigmoid loss over patches and phrases; colour phrases of colourless pictures do not count."""
    counts = torch.ones_like(truth)
    counts[:, :, : len(COLOURS)] = coloured.view(-1, 1, 1).float()
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), truth, reduction="none")
    return (loss * counts).sum() / counts.sum()


class PhraseHead(nn.Module):
    """One embedding a phrase; the logit is its product with the patch feature, plus a bias."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.phrases = nn.Linear(hidden, len(PHRASES))

    def forward(self, patches: Tensor) -> Tensor:
        """Return a logit for each patch and phrase: (batch, patches, hidden) -> (batch, patches, phrases)."""
        return self.phrases(self.norm(patches))


def train_vision_tower(
    folder: Path, workers: Executor, *, steps: int, pictures: int, batch: int = 1024, seed: int = 2
) -> dict[str, float]:
    """Train, save as bf16 safetensors, and score a linear probe at FEATURE_LAYER.

    Returns:
        share of objects whose colour, shape and size are all read right, on new scenes of the training
        pairs ("train_pairs") and of the held-out pairs ("held_out_pairs"), and each attribute's share.
    """
    shards = 64
    jobs = [workers.submit(make_pictures, seed * 1000 + k, pictures // shards, "train", True) for k in range(shards)]
    parts = [job.result() for job in jobs]
    pixels, table = (torch.cat([part[k] for part in parts]).to(DEVICE) for k in (0, 1))
    torch.manual_seed(seed)
    tower: Any = CLIPVisionModel(_config())  # transformers' .to() is typed as if it could not be called
    tower.to(DEVICE)
    heads = [PhraseHead(tower.config.hidden_size).to(DEVICE) for _ in range(2)]
    step_tower = torch.compile(tower)
    parameters = [weight for module in (tower, *heads) for weight in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        rows = torch.randint(len(pixels), (batch,), device=DEVICE)
        truth = table[rows].float()
        values, coloured = _augment(_pixels_to_unit(pixels[rows]))
        with torch.autocast(DEVICE, torch.bfloat16):
            states = step_tower(_normalise(values), output_hidden_states=True).hidden_states
            logits = [head(states[layer][:, 1:]) for head, layer in zip(heads, (FEATURE_LAYER, -1), strict=True)]
        loss = torch.stack([_loss(x, truth, coloured) for x in logits]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 500 == 0 or step == steps - 1:
            print(f"vision tower: step {step}/{steps} loss {loss.item():.5f}", flush=True)
    tower.to(torch.bfloat16).save_pretrained(folder)
    size = {"shortest_edge": IMAGE_SIZE}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n", encoding="utf-8")
    return score_vision_tower(folder, heads[0])


@torch.no_grad()
def score_vision_tower(folder: Path, head: PhraseHead, number: int = 4000) -> dict[str, float]:
    """Score the saved tower's FEATURE_LAYER with the phrase head that was trained on it."""
    tower: Any = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32)
    tower.to(DEVICE).eval()
    scores: dict[str, float] = {}
    for split in ("train", "held_out"):
        pixels, table = make_pictures(99, number, split, False)
        states = tower(_normalise(_pixels_to_unit(pixels.to(DEVICE))), output_hidden_states=True).hidden_states
        logits = head(states[FEATURE_LAYER][:, 1:]).float().cpu()
        objects = ~table[..., PHRASES.index("empty")]
        every = torch.ones(int(objects.sum()), dtype=torch.bool)
        for name, words in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
            at = [PHRASES.index(word) for word in words]
            right = logits[objects][:, at].argmax(-1) == table[objects][:, at].int().argmax(-1)
            scores[f"{split}_pairs_{name}"] = right.float().mean().item()
            every &= right
        scores[f"{split}_pairs"] = every.float().mean().item()
        empty = (logits[..., PHRASES.index("empty")] > 0) == ~objects
        scores[f"{split}_pairs_empty"] = empty.float().mean().item()
    return scores
