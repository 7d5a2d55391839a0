"""A run that goes on from what XTuner would have written at its middle ends as one that was never interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.formats.xtuner import from_live
from dianjing.importing.run import ImportOptions, import_run
from dianjing.run.checkpoint import newest
from dianjing.train.loop import train
from tests.conftest import MakeRecipe
from tests.xtuner import XTUNER
from tests.xtuner_writer import client_state, write_iter, write_zero3, write_zero12

MIDDLE, END = 10, 21
INTERNLM2 = XTUNER / "tiny" / "tiny_internlm2"
TOWER = XTUNER / "tiny" / "tiny_clip"
LLM_LORA = {"tuning": "lora", "lora_rank": 4, "lora_alpha": 2.0, "lora_head": True, "lora_share_qkv": True}
TRAIN = {"global_batch_size": 3, "epochs": 7, "warmup_ratio": 0.1, "save_every": MIDDLE, "keep": 9}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {"language_model": {"folder": str(INTERNLM2)}}),
    "lora": (
        "finetune",
        {
            "language_model": {"folder": str(INTERNLM2), **LLM_LORA},
            "vision_tower": {"tuning": "lora", "lora_rank": 2, "lora_alpha": 1.0},
        },
    ),
    "full": ("finetune", {"language_model": {"tuning": "full"}, "vision_tower": {"tuning": "full"}}),
}
CONFIG = """
from xtuner.model import LLaVAModel
max_length = int(2048 - (336 / 14)**2)
tokenizer = dict(type='transformers.AutoTokenizer.from_pretrained', padding_side='right')
model = dict(
    type=LLaVAModel,
    llm=dict(pretrained_model_name_or_path='/elsewhere/llm', trust_remote_code=True),
    {loras}
    visual_encoder=dict(pretrained_model_name_or_path='/elsewhere/clip'))
train_dataloader = dict(
    batch_size={batch},
    dataset=dict(
        data_path='/elsewhere/data.json', image_folder='/elsewhere/images', max_length=max_length,
        pad_image_to_square={pad}, tokenizer=tokenizer,
        template_map_fn=dict(template='xtuner.utils.PROMPT_TEMPLATE.internlm2_chat')),
    sampler=dict(type='xtuner.dataset.samplers.{sampler}'))
optim_wrapper = dict(
    optimizer=dict(type='torch.optim.AdamW', lr=0.002, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False), accumulative_counts=1)
param_scheduler = [
    dict(type='mmengine.optim.LinearLR', begin=0, end=0.7, by_epoch=True, start_factor=1e-05),
    dict(type='mmengine.optim.CosineAnnealingLR', begin=0.7, end=7, by_epoch=True, eta_min=0.0)]
train_cfg = dict(type='xtuner.engine.runner.TrainLoop', max_epochs=7)
"""
LORAS = """llm_lora=dict(r=4, lora_alpha=2, lora_dropout=0.0, bias='none', type='peft.LoraConfig'),
    visual_encoder_lora=dict(r=2, lora_alpha=1, lora_dropout=0.0, bias='none', type='peft.LoraConfig'),"""


class Straight:
    """A run of 21 steps, and what XTuner would have saved after ten of them."""

    def __init__(self, kind: str, recipe: Recipe) -> None:
        self.recipe, self.run = recipe, train(recipe, quiet=True)
        checkpoint = self.run / "checkpoints" / f"step-{MIDDLE:06d}"
        self.internlm2 = recipe.language_model.folder == str(INTERNLM2)
        self.weights = self._xtuners(load_file(checkpoint / "trainable.safetensors"))
        memory = load_file(checkpoint / "optimizer.safetensors")
        kinds = {
            kind: self._xtuners({name[: -len(kind) - 1]: memory[name] for name in memory if name.endswith(f"/{kind}")})
            for kind in ("exp_avg", "exp_avg_sq")
        }
        step = {"step": torch.tensor(float(MIDDLE))}
        self.moments = {name: {**step, **{k: v[name] for k, v in kinds.items()}} for name in self.weights}
        self.weights |= dead_weights(kind, recipe)
        self.forms = FORMS if kind == "lora" else ["iter.pth", {"full": "zero2 of three"}.get(kind, "zero3 of three")]
        self.extra = client_state(config_text(kind, ranks=1), MIDDLE, END)

    def _xtuners(self, live: dict[str, Tensor]) -> dict[str, Tensor]:
        config: Any = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2})
        return from_live(live, config, internlm2=self.internlm2)


def config_text(kind: str, ranks: int) -> str:
    sampler = "DefaultSampler" if kind == "pretrain" else "LengthGroupedSampler"
    loras = LORAS if kind == "lora" else ""
    return CONFIG.format(loras=loras, sampler=sampler, pad=kind != "pretrain", batch=3 // ranks)


def dead_weights(kind: str, recipe: Recipe) -> dict[str, Tensor]:
    """Return what XTuner saves beside: its LoRA on the tower's last layer, or that layer; old tables."""
    tower = CLIPVisionModel.from_pretrained(recipe.vision_tower.folder)
    layer = "encoder.layers.2."
    found = {}
    for name, weight in tower.state_dict().items():
        if kind == "full" and name.startswith((layer, "post_layernorm")):
            found[f"visual_encoder.vision_model.{name}"] = weight.clone()
        elif kind == "lora" and name.startswith(layer) and weight.ndim == 2:
            stem = f"visual_encoder.base_model.model.vision_model.{name.removesuffix('.weight')}"
            found[f"{stem}.lora_A.default.weight"] = torch.randn(2, weight.shape[1])
            found[f"{stem}.lora_B.default.weight"] = torch.zeros(weight.shape[0], 2)
    if kind == "full":
        found["visual_encoder.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return found


@pytest.fixture(params=KINDS)
def straight(request: pytest.FixtureRequest, make_recipe: MakeRecipe, tmp_path: Path) -> Straight:
    stage, sections = KINDS[request.param]
    tower = {"folder": str(TOWER), **sections.get("vision_tower", {})}
    data = {
        "aspect": "crop" if stage == "pretrain" else "pad",
        "order": "shuffle" if stage == "pretrain" else "length_grouped",
        "max_tokens": 1472,
        "on_long_record": "truncate",
    }
    train_section = {**TRAIN, "learning_rate": 0.002}
    recipe = make_recipe(stage, **{**sections, "vision_tower": tower, "data": data, "train": train_section})
    return Straight(request.param, replace(recipe, output=str(tmp_path / "straight")))


Write = Callable[[Path, Straight], Path]
FORMS: dict[str, Write] = {
    "iter.pth": lambda path, run: write_iter(path, run.weights, run.moments, run.extra),
    "zero2 of one": lambda path, run: write_zero12(
        path, run.weights, run.moments, run.extra, ranks=1, dtype=torch.float16
    ),
    "zero2 of three": lambda path, run: write_zero12(
        path, run.weights, run.moments, run.extra, ranks=3, dtype=torch.bfloat16
    ),
    "zero3 of three": lambda path, run: write_zero3(path, run.weights, run.moments, run.extra, ranks=3, subgroups=3),
}


def learned(run: Path) -> dict[str, bytes]:
    return {name: (newest(run) / name).read_bytes() for name in ("trainable.safetensors", "optimizer.safetensors")}


def test_going_on_from_xtuners_checkpoint_is_going_straight(straight: Straight, tmp_path: Path) -> None:
    expected = learned(straight.run)
    absent = ["mmengine"] + ["deepspeed"] * (find_spec("deepspeed") is None)  # accelerate imports one that is there
    for form, write in FORMS.items():
        if form not in straight.forms:
            continue
        if "three" in form:
            kind = "pretrain" if straight.recipe.stage == "pretrain" else "lora" if straight.internlm2 else "full"
            straight.extra["meta"]["cfg"] = config_text(kind, ranks=3)
        source = write(tmp_path / form / "iter_10.pth" if form != "iter.pth" else tmp_path / "iter_10.pth", straight)
        assert not any(name.startswith(tuple(absent)) for name in sys.modules)
        run = tmp_path / f"from {form}"
        recipe = straight.recipe
        options = ImportOptions(
            llm=recipe.language_model.folder,
            vision_tower=recipe.vision_tower.folder,
            data=str(recipe.data.path),
            images=recipe.data.images,
        )
        report = import_run(source, run, options)
        assert f"it can be trained on: step {MIDDLE} of {END}" in report, form
        train(load_recipe(run / "recipe.toml"), resume=True, quiet=True)
        assert learned(run) == expected, form
