"""Every shipped recipe can be read, says what it is, trains what it says, and is written back to the same recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from dianjing.config.load import load_recipe, save_recipe
from dianjing.config.schema import Recipe
from dianjing.infer.load import load_for_use
from dianjing.model.build import build
from dianjing.model.forward import num_tower_layers
from dianjing.model.stage import part_of
from dianjing.model.weights import PROJECTOR
from dianjing.run.checkpoint import save
from dianjing.run.journal import read_journal
from dianjing.run.state import TrainState
from dianjing.start import settle
from dianjing.train.loop import train
from tests.house.source import PACKAGE
from tests.recipe_models import write_family, write_siglip
from tests.tiny import TinyDataset, write_clip

RECIPES = sorted((PACKAGE / "recipes").glob("*.toml"))
STANDS_FOR: dict[str, Callable[[Path], object]] = {
    "models/internlm2-chat-1_8b": lambda folder: write_family(folder, "internlm2"),
    "models/vicuna-7b-v1.5": lambda folder: write_family(folder, "vicuna"),
    "models/Llama-3.2-1B-Instruct": lambda folder: write_family(folder, "llama"),
    "models/Qwen3-1.7B": lambda folder: write_family(folder, "qwen3"),
    "models/clip-vit-large-patch14-336": write_clip,
    "models/siglip2-so400m-patch14-384": write_siglip,
}
"""The folders that recipes name, and what is made there: tiny, of the same family and layout."""

STARTED = [path for path in RECIPES if load_recipe(str(path)).projector.init_from]
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all models that recipes name lie."""
    root = tmp_path_factory.mktemp("recipes")
    for name, write in STANDS_FOR.items():
        (root / name).mkdir(parents=True)
        write(root / name)
    return root


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 12


@every_recipe
def test_recipe_is_read_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(str(path), {}) == load_recipe(path.stem, {})


@every_recipe
def test_recipe_begins_with_a_sentence_on_itself(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 120
    assert len(path.stem) <= 80  # `dianjing recipes` gives each name a line


@every_recipe
def test_recipe_survives_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path), {})
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(str(tmp_path / "recipe.toml"), {}) == recipe


def tiny(path: Path, models: Path, data: TinyDataset, folder: Path) -> Recipe:
    """Return the recipe with its folders found under `models`, tiny data, and two steps to go."""
    recipe = load_recipe(str(path))
    if recipe.language_model.quantization and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("four-bit weights need bitsandbytes: pip install 'dianjing[qlora]'")
    folders: dict[str, str] = (
        {}
        if recipe.start_from
        else {
            f"{section}.folder": name if name == "tinyworld" else str(models / name)
            for section in ("language_model", "vision_tower")
            for name in [getattr(recipe, section).folder]
        }
    )
    places = {"data.path": str(data.path), "data.images": str(data.images), "output": str(folder / "run")}
    short = {"train.max_steps": 2, "train.epochs": 2, "train.global_batch_size": 4, "train.sample_every": 0}
    overrides = {**folders, **places, **short, "data.workers": 0, "train.log_every": 1, "train.precision": "fp32"}
    if recipe.start_from:
        first = train(tiny(path.with_name("tinyworld_finetune.toml"), models, data, folder / "first"), quiet=True)
        return settle(load_recipe(str(path), {**overrides, "start_from": str(first)}), write=True)
    tried = load_recipe(str(path), {**overrides, "projector.init_from": ""})
    if not recipe.projector.init_from:
        return tried
    projector = build(replace(tried, seed=9)).model.model.multi_modal_projector.state_dict()
    learned = {f"{PROJECTOR}{name}": weight for name, weight in projector.items()}
    at = TrainState(step=1, epoch=0, samples_seen=0, total_steps=1, recipe={}, data={})
    pretrained = save(folder / "pretrained", learned, {"step": torch.ones(1)}, at, keep=1)
    return load_recipe(str(path), {**overrides, "projector.init_from": str(pretrained)})


@every_recipe
def test_recipe_trains_what_it_says(path: Path, models: Path, tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    recipe = tiny(path, models, tiny_dataset, tmp_path)
    run = train(recipe, quiet=True)
    losses = [row["loss"] for row in read_journal(run)]
    assert len(losses) == 2
    model: Any = load_for_use(str(run), "cpu").model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    llm, tower = recipe.language_model, recipe.vision_tower
    assert {name for name in trained if part_of(name) == "projector"} == {
        f"{PROJECTOR}{name}" for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    }
    assert {part_of(name) for name in trained} == {"projector"} | {
        part for part, config in (("language_model", llm), ("vision_tower", tower)) if config.tuning != "frozen"
    }
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    linears = {
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear | LoraLayer) and ".lora_" not in name and ".base_layer" not in name
    }
    expected = (linears | ({"lm_head"} if llm.lora_head else set())) if llm.tuning == "lora" else set()
    assert {name for name in adapted if "vision_tower" not in name} == expected
    reached = {int(name.split(".")[4]) for name in adapted if "vision_tower" in name}
    assert reached == (set(range(num_tower_layers(model))) if tower.tuning == "lora" else set())


@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.stem)
def test_recipe_begins_with_the_projector_it_names(
    path: Path, models: Path, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    recipe = tiny(path, models, tiny_dataset, tmp_path)
    named = load_file(Path(recipe.projector.init_from) / "trainable.safetensors")
    projector = build(recipe).model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(weight, named[f"{PROJECTOR}{name}"]) for name, weight in projector.items())
