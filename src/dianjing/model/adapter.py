"""The weights that a LoRA run has learned, as a small folder in peft's format.

    adapter/
        recipe.toml             the run's recipe: it names the two base folders
        bases.json              what their files looked like
        language_model/         adapter_config.json, adapter_model.safetensors: peft's
        vision_tower/           the same, for the tower
        projector.safetensors

A part that has no adapter has no folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dianjing.config.load import save_recipe
from dianjing.config.schema import LanguageModelConfig, Recipe, VisionTowerConfig
from dianjing.errors import ModelError
from dianjing.formats.weights import name_some
from dianjing.model.folders import TINYWORLD, Part, resolve
from dianjing.model.stage import part_of
from dianjing.model.weights import PROJECTOR, PROJECTOR_FILE, trainable_state
from dianjing.run.fingerprints import HASHED, base_fingerprint
from dianjing.run.layout import RECIPE

BASES_FILE = "bases.json"
PARTS: tuple[Part, ...] = ("language_model", "vision_tower")
_PREFIXES = {
    "model.language_model.": "base_model.model.model.",
    "lm_head.": "base_model.model.lm_head.",
    "model.vision_tower.": "base_model.model.",
}
"""Live names -> names in peft's file, whose root is the causal LM, or the tower."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder is one that `save_adapter` wrote."""
    return (folder / BASES_FILE).is_file()


def save_adapter(model: nn.Module, recipe: Recipe, folder: Path) -> None:
    """Write the projector, the adapters of both parts, the recipe and what the bases look like."""
    state = model.state_dict()
    learned = {name.removeprefix(PROJECTOR): weight for name, weight in state.items() if name.startswith(PROJECTOR)}
    save_file({name: weight.float().contiguous() for name, weight in learned.items()}, folder / PROJECTOR_FILE)
    bases: dict[str, Any] = {"hashed": HASHED}
    for part in PARTS:
        config = getattr(recipe, part)
        bases[part] = {"folder": _absolute(config.folder), "sha256": base_fingerprint(resolve(config.folder, part))}
        # A shared lora_A stands under each name that uses it: peft's file has no sharing.
        adapter = {
            _peft_name(name): weight.float().clone()
            for name, weight in state.items()
            if ".lora_" in name and part_of(name) == part
        }
        if adapter:
            (folder / part).mkdir()
            save_file(adapter, folder / part / "adapter_model.safetensors", metadata={"format": "pt"})
            settings = json.dumps(_lora_config(part, config, adapter), indent=2) + "\n"
            (folder / part / "adapter_config.json").write_text(settings, encoding="utf-8")
    (folder / BASES_FILE).write_text(json.dumps(bases, indent=2) + "\n", encoding="utf-8")
    save_recipe(_portable(recipe), folder / RECIPE)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put what `save_adapter` wrote into a model with its adapters still new.

    Raises:
        ModelError: a file is missing or damaged, or is not of this model.
    """
    try:
        projector = load_file(folder / PROJECTOR_FILE)
        read = {PROJECTOR + name: weight for name, weight in projector.items()}
        for part in PARTS:
            path = folder / part / "adapter_model.safetensors"
            if path.is_file():
                read |= {_live_name(name, part): weight for name, weight in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read: {error}; export it again") from None
    state = model.state_dict()
    learned = {name for name in state if ".lora_" in name} | trainable_state(model).keys()
    wrong = learned ^ read.keys() or {name for name in learned if state[name].shape != read[name].shape}
    if wrong:
        raise ModelError(f"{folder}: {name_some(wrong)} are not those of {RECIPE}; export the run again")
    for name in learned:
        state[name].copy_(read[name])
    if torn := {name for name in learned if not torch.equal(state[name].float(), read[name])}:
        raise ModelError(f"{folder}: {name_some(torn)} should be one shared weight, but differ; export the run again")


def require_bases(recipe: Recipe, folder: Path) -> None:
    """Refuse to put an adapter on other weights than those it was trained on.

    Raises:
        ModelError: a base folder is gone, or is another model's.
    """
    bases: Mapping[str, Any] = json.loads((folder / BASES_FILE).read_text(encoding="utf-8"))
    for part in PARTS:
        base = getattr(recipe, part).folder
        if base_fingerprint(resolve(base, part)) != bases[part]["sha256"]:
            raise ModelError(
                f"{folder}: {base} is not the {part.replace('_', ' ')} that the adapter was trained on (its files "
                f"differ from what {BASES_FILE} says); write the right folder to {part}.folder in {RECIPE}"
            )


def _peft_name(live: str) -> str:
    prefix = next(prefix for prefix in _PREFIXES if live.startswith(prefix))
    return _PREFIXES[prefix] + live.removeprefix(prefix).replace(".default.", ".")


def _live_name(name: str, part: Part) -> str:
    """Return the live name of a weight in a part's file; a name of no part comes back as it is, to be refused."""
    for live, written in _PREFIXES.items():
        if name.startswith(written) and part_of(live) == part:
            inner = name.removeprefix(written)
            return live + inner.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
    return name


def _lora_config(
    part: Part, config: LanguageModelConfig | VisionTowerConfig, adapter: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return adapter_config.json of a part."""
    targets = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapter}
    if part == "language_model":
        # All its linear layers: the ends of the names say as much, and other programs know them.
        targets = {target.rpartition(".")[-1] for target in targets}
    lora = LoraConfig(
        base_model_name_or_path=_absolute(config.folder),
        task_type="CAUSAL_LM" if part == "language_model" else None,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=config.lora_dropout,
        inference_mode=True,
    )
    # peft would keep a set, which has another order in every process.
    return lora.to_dict() | {"target_modules": sorted(targets)}


def _absolute(folder: str) -> str:
    """Return the whole path of a folder; a name that is not a path ("tinyworld") stays as it is."""
    path = Path(folder).expanduser()
    return str(path.resolve()) if folder != TINYWORLD and path.is_dir() else folder


def _portable(recipe: Recipe) -> Recipe:
    """Return the recipe without the places on this machine that only training reads."""
    language_model, vision_tower = (
        replace(config, folder=_absolute(config.folder)) for config in (recipe.language_model, recipe.vision_tower)
    )
    paths = [recipe.data.path] if isinstance(recipe.data.path, str) else recipe.data.path
    return replace(
        recipe,
        output="",
        language_model=language_model,
        vision_tower=vision_tower,
        projector=replace(recipe.projector, init_from=""),
        data=replace(recipe.data, path=tuple(Path(path).name for path in paths), images=""),
        train=replace(recipe.train, sample_every=0, sample_path=""),
    )
