"""What a run has learned, out of a model and into it, each name and shape accounted for."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dianjing.errors import ModelError
from dianjing.formats.source import open_foreign
from dianjing.formats.weights import name_some
from dianjing.formats.xtuner import PROJECTOR as FOREIGN_PROJECTOR
from dianjing.formats.xtuner import live_parts, require_two_layers

TRAINABLE = "trainable.safetensors"
PROJECTOR = "model.multi_modal_projector."


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
def load_projector(model: LlavaForConditionalGeneration, source: str | Path) -> Path:
    """Put the projector that another run has learned last into the model; return the file or folder it was in.

    `source` is the folder of a run or of one of its checkpoints, or a checkpoint of XTuner or LLaVA in any form that
    `dianjing import` reads.

    Raises:
        ModelError: there is no checkpoint, it is damaged, or its projector joins another vision tower or LLM, or holds
            what are no weights.
    """
    path = Path(source).expanduser()
    if not os.path.exists(path):
        raise ModelError(f"{path}: no such run or checkpoint; projector.init_from names one to take the projector from")
    checkpoint = _newest(path)
    learned = _own_projector(checkpoint) if checkpoint else _foreign_projector(path)
    own = model.model.multi_modal_projector.state_dict()
    _require_projector(learned, own, checkpoint or path)
    for name, weight in own.items():
        weight.copy_(learned[name])
    return checkpoint / TRAINABLE if checkpoint else path


def _require_projector(learned: Mapping[str, Tensor], own: Mapping[str, Tensor], where: Path) -> None:
    """Refuse what is not the weights of exactly the projector that is needed.

    Raises:
        ModelError: says what is there.
    """
    if not learned:
        raise ModelError(f"{where}: there is no projector in it; projector.init_from names a pretrain run")
    faults = {"missing": own.keys() - learned.keys(), "left over": learned.keys() - own.keys()}
    if found := [f"{name_some(names)} {fault}" for fault, names in faults.items() if names]:
        raise ModelError(
            f"{where}: its projector is not two linear layers with biases: {'; '.join(found)}; projector.init_from "
            "names a pretrain run"
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
        raise ModelError(f"{where}: {name_some(kinds)} in it are no weights; name a checkpoint in fp32, bf16 or fp16")
    if broken := [name for name, weight in learned.items() if not weight.float().isfinite().all()]:
        raise ModelError(
            f"{where}: {name_some(broken)} hold values that are no finite numbers: the run had failed when this was "
            "saved; name an earlier checkpoint in projector.init_from"
        )


def _own_projector(checkpoint: Path) -> dict[str, Tensor]:
    path = checkpoint / TRAINABLE
    if fault := _damage(path):
        raise ModelError(f"{path}: damaged: {fault}; name an earlier checkpoint in projector.init_from")
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PROJECTOR)]  # noqa: SIM118 (it is no dict)
        return {name.removeprefix(PROJECTOR): file.get_tensor(name) for name in names}


def _foreign_projector(path: Path) -> dict[str, Tensor]:
    weights = open_foreign(path, optimizer=False).weights
    require_two_layers(weights, path)
    parts = [live_parts(name, weight, None) for name, weight in weights.items() if name.startswith(FOREIGN_PROJECTOR)]
    return {name.removeprefix(PROJECTOR): weight for part in parts for name, weight in part.items()}


def _newest(run: Path) -> Path | None:
    """Return a checkpoint of ours, or the last one of a run; None when it is neither."""
    if (run / TRAINABLE).is_file():
        return run
    found = sorted(run.glob(f"checkpoints/step-*/{TRAINABLE}"))
    if not found and (run / "recipe.toml").is_file():
        raise ModelError(f"{run}: no checkpoint of this run is there; train it first")
    return found[-1].parent if found else None


def _damage(path: Path) -> str:
    """Return how a file differs from what the manifest beside it says was written, "" for not at all."""
    try:
        written = json.loads(path.with_name("manifest.json").read_text(encoding="utf-8"))["files"][path.name]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read: {error!r}"
    return "" if found == written["sha256"] else "it is not what was written"


def _widths(projector: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the widths of tower and LLM that a projector joins; 0 where a weight is no matrix."""
    first, last = projector["linear_1.weight"].shape, projector["linear_2.weight"].shape
    return first[1] if len(first) == 2 else 0, last[0] if len(last) == 2 else 0


def _size(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape)) or "one number"
