"""What most tests start from; all of it is made in code, once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dianjing.config.schema import DataConfig, LanguageModelConfig, Recipe, TrainConfig, VisionTowerConfig
from dianjing.language import CHOSEN
from tests.tiny import TinyDataset, write_clip, write_dataset, write_llm, write_siglip

os.environ[CHOSEN] = "en"  # whatever the locale
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with a tokenizer that knows InternLM2's chat marks."""
    return write_llm(tmp_path_factory.mktemp("tiny_llm"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random CLIP vision tower."""
    return write_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random SigLIP vision tower."""
    return write_siglip(tmp_path_factory.mktemp("tiny_siglip"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """Eight records and their pictures; read only."""
    return write_dataset(tmp_path_factory.mktemp("tiny_dataset"))


@pytest.fixture
def make_recipe(tiny_llm: Path, tiny_clip: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> MakeRecipe:
    """Return a maker of recipes on the tiny parts: make_recipe("finetune", language_model={"tuning": "lora"})."""

    def make(stage: str = "pretrain", **sections: Any) -> Recipe:
        recipe = Recipe(
            stage=stage,
            output=str(tmp_path / "run"),
            language_model=LanguageModelConfig(folder=str(tiny_llm), template="internlm2_chat", lora_rank=4),
            vision_tower=VisionTowerConfig(folder=str(tiny_clip), lora_rank=2),
            data=DataConfig(path=str(tiny_dataset.path), images=str(tiny_dataset.images), pack_tokens=256),
            train=TrainConfig(global_batch_size=4, precision="fp32", log_every=1),
        )
        for name, value in sections.items():
            changed = replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
            recipe = replace(recipe, **{name: changed})
        return recipe

    return make
