"""What a run has learned, out of a model and into it, each name and shape accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dianjing.errors import ModelError
from dianjing.model.language import name_some

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
def load_projector(model: LlavaForConditionalGeneration, run: str | Path) -> Path:
    """Put the projector that another run has learned last into the model; return the file it was in.

    `run` is the folder of the run or of one of its checkpoints.

    Raises:
        ModelError: there is no checkpoint, or its projector joins another vision tower or LLM.
    """
    path = _newest(Path(run).expanduser())
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(PROJECTOR)]  # noqa: SIM118 (it is no dict)
            learned = {name.removeprefix(PROJECTOR): file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged: {error}; name an earlier checkpoint in projector.init_from") from None
    own = model.model.multi_modal_projector.state_dict()
    if learned.keys() != own.keys():
        raise ModelError(f"{path}: there is no projector in it; projector.init_from names a pretrain run")
    there, here = _widths(learned), _widths(own)
    if there != here:
        raise ModelError(
            f"{path}: the projector is of another vision tower or LLM: it goes {there[0]} -> {there[1]}, here "
            f"{here[0]} -> {here[1]} is needed; pretrain with these two first"
        )
    for name, weight in own.items():
        weight.copy_(learned[name])
    return path


def _newest(run: Path) -> Path:
    """Return the file of what was learned in a checkpoint, or in the last checkpoint of a run."""
    found = [*run.glob("trainable.safetensors"), *sorted(run.glob("checkpoints/step-*/trainable.safetensors"))]
    if not found:
        raise ModelError(f"{run}: no checkpoint of a run is there; projector.init_from names the folder of a run")
    return found[-1]


def _widths(projector: Mapping[str, Tensor]) -> tuple[int, int]:
    return projector["linear_1.weight"].shape[1], projector["linear_2.weight"].shape[0]


def _size(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape))
