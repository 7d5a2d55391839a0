"""Learned weights of a run, out of a model and into it; names and shapes must match exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dianjing.config.schema import Recipe
from dianjing.errors import ModelError
from dianjing.formats.llava_folder import is_llava_folder, part_weights
from dianjing.formats.source import open_foreign
from dianjing.formats.weights import name_some
from dianjing.formats.xtuner import PROJECTOR as FOREIGN_PROJECTOR
from dianjing.formats.xtuner import live_parts, require_two_layers
from dianjing.model.folders import projector_source
from dianjing.model.projector import Kind, kind_of
from dianjing.run.checkpoint import find_checkpoint
from dianjing.run.layout import TRAINABLE

PROJECTOR = "model.multi_modal_projector."
PROJECTOR_FILE = "projector.safetensors"
"""In an `adapter` export."""


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that train, each once, by their names in the live model."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `trainable_state` returned.

    Raises:
        ModelError: names or shapes are not exactly those of the parameters that train.
    """
    own = trainable_state(model)
    shapes = [
        f"{name} ({_size(state[name])} in the checkpoint, {_size(own[name])} here)"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    faults = {"missing": own.keys() - state.keys(), "left over": state.keys() - own.keys(), "of another shape": shapes}
    found = [f"{name_some(names)} {fault}" for fault, names in faults.items() if names]
    if found:
        raise ModelError(f"the checkpoint is not of this model and recipe: {'; '.join(found)}")
    for name, weight in own.items():
        weight.copy_(state[name])


@torch.no_grad()
def load_start(model: nn.Module, recipe: Recipe) -> None:
    """Let adapters, or fully tuned parts, go on from the run that `start_from` names; new adapters stay new.

    Raises:
        ModelError: a weight of it does not train here, or has another shape.
    """
    checkpoint = find_checkpoint(Path(recipe.projector.init_from).expanduser()) if recipe.start_from else None
    if checkpoint is None:  # a LLaVA: its parts are the base models
        return
    own, learned = trainable_state(model), load_file(checkpoint / TRAINABLE)
    wrong = [name for name, weight in learned.items() if name not in own or own[name].shape != weight.shape]
    if wrong:
        raise ModelError(f"{checkpoint}: {name_some(wrong)} do not train in this recipe, or have another shape")
    for name, weight in learned.items():
        own[name].copy_(weight)


@torch.no_grad()
def load_projector(
    model: LlavaForConditionalGeneration, source: str | Path, notify: Callable[[str], object] | None = None
) -> Path:
    """Put the projector of another run's newest whole checkpoint into the model; return the file or folder it was in.

    `source` is the folder of a run or of one of its checkpoints, an `adapter` export, a LLaVA in transformers'
    layout, or a checkpoint of XTuner or LLaVA in any form that `dianjing import` reads. `notify` (default: stderr) gets
    a line for each checkpoint that was passed over.

    Raises:
        CheckpointError: there is no checkpoint in the run, or none that is whole.
        ModelError: nothing is there; or its projector joins another vision tower or LLM, or does not hold weights.
    """
    path = projector_source(source)
    learned = _exported_projector(path)
    checkpoint = None if learned else find_checkpoint(path, notify)
    projector = model.model.multi_modal_projector
    kind = kind_of(projector)
    learned = learned or (_own_projector(checkpoint) if checkpoint else _foreign_projector(path, kind))
    own = projector.state_dict()
    _require_projector(learned, own, kind, checkpoint or path)
    for name, weight in own.items():
        weight.copy_(learned[name])
    return checkpoint / TRAINABLE if checkpoint else path


def _require_projector(learned: Mapping[str, Tensor], own: Mapping[str, Tensor], kind: Kind, where: Path) -> None:
    """Refuse what is not the weights of exactly the projector that is needed.

    Raises:
        ModelError: says what is there.
    """
    if not learned:
        raise ModelError(f"{where}: there is no projector in it; projector.init_from names a pretrain run")
    faults = {"missing": own.keys() - learned.keys(), "left over": learned.keys() - own.keys()}
    if found := [f"{name_some(names)} {fault}" for fault, names in faults.items() if names]:
        raise ModelError(
            f"{where}: its projector is not {kind.words}: {'; '.join(found)}; projector.init_from names a pretrain run"
        )
    shapes = [
        f"{name} ({_size(learned[name])} in it, {_size(own[name])} here)"
        for name in own
        if learned[name].shape != own[name].shape
    ]
    there, here = _widths(learned), _widths(own)
    if shapes and there != here and 0 not in there:
        raise ModelError(
            f"{where}: the projector is of another vision tower or LLM: it goes {there[0]} -> {there[1]}, "
            f"here {here[0]} -> {here[1]} is needed; pretrain with these two first"
        )
    if shapes:
        raise ModelError(
            f"{where}: its projector is of another shape: {name_some(shapes)}; pretrain with Dianjing first"
        )
    kinds = [f"{name} ({weight.dtype})" for name, weight in learned.items() if not weight.is_floating_point()]
    if kinds:
        raise ModelError(f"{where}: {name_some(kinds)} in it are not weights; name a checkpoint in fp32, bf16 or fp16")
    if broken := [name for name, weight in learned.items() if not weight.float().isfinite().all()]:
        raise ModelError(
            f"{where}: {name_some(broken)} hold values that are not finite: the run had failed when this was saved; "
            "name an earlier checkpoint in projector.init_from"
        )


def _exported_projector(path: Path) -> dict[str, Tensor]:
    """Return the projector of an `adapter` export; nothing for anything else."""
    return load_file(path / PROJECTOR_FILE) if (path / PROJECTOR_FILE).is_file() else {}


def _own_projector(checkpoint: Path) -> dict[str, Tensor]:
    with safe_open(checkpoint / TRAINABLE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PROJECTOR)]  # noqa: SIM118 (not a dict)
        return {name.removeprefix(PROJECTOR): file.get_tensor(name) for name in names}


def _foreign_projector(path: Path, kind: Kind) -> dict[str, Tensor]:
    if path.is_dir() and is_llava_folder(path):
        return part_weights(path, "projector")
    if kind.foreign is None:
        raise ModelError(
            f"{path}: XTuner and LLaVA have no projector of {kind.words}; name a run of Dianjing in "
            'projector.init_from, or set projector.kind to "mlp"'
        )
    weights = open_foreign(path, optimizer=False).weights
    require_two_layers(weights, path)
    parts = [live_parts(name, weight, None) for name, weight in weights.items() if name.startswith(FOREIGN_PROJECTOR)]
    return {name.removeprefix(PROJECTOR): weight for part in parts for name, weight in part.items()}


def _widths(projector: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the widths of tower and LLM that a projector joins; 0 where a weight is not a matrix."""
    first = projector["linear_1.weight"].shape
    last = projector["linear_2.weight"].shape if "linear_2.weight" in projector else first
    return first[1] if len(first) == 2 else 0, last[0] if len(last) == 2 else 0


def _size(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape)) or "one number"
