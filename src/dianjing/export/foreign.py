"""Shared by the formats of XTuner and LLaVA: the run behind them, the LLM's tokenizer, reading a folder back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from dianjing.config.schema import Recipe
from dianjing.errors import ExportError, ModelError
from dianjing.export.files import write_json
from dianjing.formats.source import open_foreign
from dianjing.formats.weights import name_some
from dianjing.formats.xtuner import to_live
from dianjing.infer.generate import LoadedModel
from dianjing.model.build import build
from dianjing.model.folders import resolve
from dianjing.model.forward import num_tower_layers
from dianjing.model.stage import apply_stage
from dianjing.model.weights import load_trainable_state, trainable_state

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def require_run(loaded: LoadedModel, program: str) -> Recipe:
    """Return the run's recipe.

    Raises:
        ExportError: the model does not come from a run.
    """
    if loaded.recipe is None:
        raise ExportError(f"{loaded.name} is not a run; only what a run has learned can be exported for {program}")
    return loaded.recipe


def read_back(loaded: LoadedModel, recipe: Recipe, folder: Path) -> LoadedModel:
    """Return the run's model as one makes it from the bases and what is in the folder.

    Raises:
        ExportError: the folder does not hold exactly what the recipe says was learned.
    """
    foreign = open_foreign(folder)
    for part, config in (("llm", recipe.language_model), ("visual_encoder", recipe.vision_tower)):
        if config.tuning == "lora" and foreign.adapters[part].alpha != config.lora_alpha:
            raise ExportError(f"the alpha of {part}'s LoRA became {foreign.adapters[part].alpha}")
    built = build(recipe, loaded.model.device, fresh_projector=True)
    apply_stage(built.model, recipe)
    found = to_live(foreign.weights, built.model.config.text_config, num_tower_layers(built.model))
    live = {name: found.live[name] for name in found.live if name not in _shared_twice(built.model, found.live)}
    if found.unknown:
        raise ExportError(f"{name_some(found.unknown)}: unknown names were written")
    try:
        load_trainable_state(built.model, live)
    except ModelError as error:
        raise ExportError(f"what was written is not what was learned: {error}") from None
    return replace(loaded, model=built.model.eval(), recipe=recipe)


def copy_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Copy the LLM's own tokenizer, without what would have its code run."""
    source = resolve(recipe.language_model.folder, "language_model")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if settings.pop("auto_map", None):
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _shared_twice(model: nn.Module, live: Mapping[str, Tensor]) -> set[str]:
    """Return the names of a shared lora_A that are not its first."""
    return {name for name in live if name in model.state_dict() and ".lora_A." in name} - trainable_state(model).keys()
