"""`start_from`: a model that sees already -> a recipe that names its parts.

A run goes on as it is where the recipe tunes its parts in the same way: adapters, or fully tuned weights, stay what
they are. Otherwise all that it has learned is merged, into an hf export in fp32 in the new run's folder. A LLaVA in
transformers' layout is read where it is.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.constants import TEMPLATE_KEY
from dianjing.errors import ConfigError, ModelError
from dianjing.formats.config import read_config
from dianjing.formats.llava_folder import NEWLINE, is_llava_config
from dianjing.model.folders import resolve
from dianjing.model.towers.families import select_strategy, tower_config
from dianjing.run.checkpoint import find_checkpoint
from dianjing.run.layout import RECIPE, START, checkpoints, is_run

PARTS = ("language_model", "vision_tower")
ADAPTER = ("lora_rank", "lora_alpha", "lora_head", "lora_share_qkv", "quantization")
"""Fields that say what an adapter is and stands on; the others say how it trains."""
READ = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
"""Values that the config.json of a LLaVA must have, if it has them at all, for its projector to be ours."""

Say = Callable[[str], object]


def settle(recipe: Recipe, say: Say = lambda line: None, *, write: bool = False) -> Recipe:
    """Return the recipe with what `start_from` brings: folders, projector, template, feature layer.

    What must be merged is written into the output folder, or, without `write`, is left as it was: its shapes are the
    same. `say` gets a line about each part.

    Raises:
        ConfigError: the recipe also names a part itself.
        ModelError: `start_from` is not a model that sees and can be read.
    """
    if not recipe.start_from:
        return recipe
    run = Path(recipe.output).expanduser()
    if checkpoints(run) and is_run(run):
        before = load_recipe(run / RECIPE)
        if before.start_from == recipe.start_from:  # resumed: with the parts that it began with
            return _with_parts(recipe, before)
    folder = resolve(recipe.start_from, "language_model", weights=write)
    if is_run(folder):
        before = _of_run(recipe, folder, say, write=write)
    elif (folder / "config.json").is_file() and is_llava_config(read_config(folder)):
        before = _of_llava(recipe, recipe.start_from, folder)
        _say_llava(folder, say)
    else:
        raise ModelError(
            f"{folder}: start_from names a model that sees: a run, an export, or a LLaVA in transformers' layout; a "
            "text LLM goes to language_model.folder, and `dianjing import` reads XTuner's and LLaVA's own checkpoints"
        )
    return _with_parts(recipe, before)


def _of_run(recipe: Recipe, source: Path, say: Say, *, write: bool) -> Recipe:
    before = load_recipe(source / RECIPE)
    checkpoint = find_checkpoint(source, say) if checkpoints(source) else None
    differ = [part for part in PARTS if not _goes_on(before, recipe, part)]
    if checkpoint and not differ:
        for part in PARTS:
            if (tuning := getattr(before, part).tuning) != "frozen":
                kept = "adapters are kept and" if tuning == "lora" else "weights"
                say(f"start_from: the {part.replace('_', ' ')}'s {kept} go on training from {checkpoint}")
        return replace(before, projector=replace(before.projector, init_from=str(checkpoint)))
    why = f"{' and '.join(differ)} had other tuning" if checkpoint else "an adapter export"
    if not write:
        say(f"start_from: what {source} has learned will be merged ({why})")
        return replace(before, projector=replace(before.projector, init_from=str(checkpoint or "")))
    merged = Path(recipe.output).expanduser() / START
    _merge(source, merged)
    say(f"start_from: what {checkpoint or source} has learned is merged into {merged}, in fp32 ({why})")
    return _of_llava(before, str(merged), merged)


def _goes_on(before: Recipe, recipe: Recipe, part: str) -> bool:
    """Return whether what a part has learned is what trains in this recipe too."""
    old, new = getattr(before, part), getattr(recipe, part)
    same = all(getattr(old, name, None) == getattr(new, name, None) for name in ADAPTER)
    return old.tuning == "frozen" or (old.tuning == new.tuning and (same or old.tuning == "full"))


def _of_llava(recipe: Recipe, name: str, folder: Path) -> Recipe:
    """Return the recipe with all parts those of a LLaVA; `name` is its folder, or its name on the hub.

    Raises:
        ModelError: it joins its parts in a way that ours are not joined.
    """
    config = read_config(folder)
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise ModelError(f"{folder}: it joins the features of several layers; start_from takes LLaVAs of one layer")
    for field, value in READ.items():
        if (found := config.get(field, value)) != value:
            raise ModelError(f"{folder}/config.json: {field} is {found}, but only {value} can be trained here")
    strategy = select_strategy(tower_config(folder))
    if (found := config.get("vision_feature_select_strategy", "default")) != strategy:
        raise ModelError(
            f'{folder}/config.json: vision_feature_select_strategy is "{found}", but only "{strategy}" can be trained '
            "here with its tower"
        )
    template = recipe.language_model.template or str(config.get(TEMPLATE_KEY) or "")
    return replace(
        recipe,
        language_model=replace(recipe.language_model, folder=name, template=template),
        vision_tower=replace(recipe.vision_tower, folder=name, feature_layer=layer),
        projector=replace(recipe.projector, init_from=str(folder)),
    )


def _say_llava(folder: Path, say: Say) -> None:
    say(f"start_from: LLM, vision tower and projector of the LLaVA in {folder}")
    if read_config(folder).get("model_type") == "llava_next":
        say(f"start_from: a LLaVA-NeXT: pictures are seen as one square, without tiles; {NEWLINE[0]} is not used")


def _with_parts(recipe: Recipe, before: Recipe) -> Recipe:
    """Return the recipe with the parts of `before`.

    Raises:
        ConfigError: it names another one itself.
    """
    wanted = {
        "language_model.folder": before.language_model.folder,
        "vision_tower.folder": before.vision_tower.folder,
        "projector.init_from": before.projector.init_from,
    }
    for name, brought in wanted.items():
        section, key = name.split(".")
        given = getattr(getattr(recipe, section), key)
        if given not in ("", brought):
            raise ConfigError(f'{name} is "{given}", but start_from brings {brought}; remove one of the two')
    if recipe.projector.kind != before.projector.kind:
        raise ConfigError(
            f'projector.kind is "{recipe.projector.kind}", but that of start_from is "{before.projector.kind}"; set it '
            "so, or name the folders instead of start_from to pretrain another projector"
        )
    template = recipe.language_model.template or before.language_model.template
    tower = replace(
        recipe.vision_tower, folder=before.vision_tower.folder, feature_layer=before.vision_tower.feature_layer
    )
    return replace(
        recipe,
        language_model=replace(recipe.language_model, folder=before.language_model.folder, template=template),
        vision_tower=tower,
        projector=replace(recipe.projector, init_from=before.projector.init_from),
    )


def _merge(source: Path, folder: Path) -> None:
    """Write a run as an hf export in fp32; where ranks are started together, the first does it and the others wait.

    Raises:
        ConfigError: it cannot be written.
    """
    while os.environ.get("RANK", "0") != "0" and not folder.is_dir():
        time.sleep(0.5)
    if os.environ.get("RANK", "0") != "0" or os.environ.get("DIANJING_LAUNCHED"):
        return
    from dianjing.export import hf  # slow to import
    from dianjing.export.formats import DEFAULTS
    from dianjing.infer.load import load_for_use

    writing = folder.with_name(f".writing-{folder.name}")
    try:
        for left in (writing, folder):
            shutil.rmtree(left, ignore_errors=True)
        writing.mkdir(parents=True)
        hf.save(load_for_use(str(source), "cpu"), writing, DEFAULTS)
        writing.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}; choose another output") from None
