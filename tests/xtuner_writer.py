"""Writes what XTuner writes, from a run of ours: iter_N.pth as mmengine saves it, and as DeepSpeed's folders.

The classes that mmengine and DeepSpeed pickle are stood in for, under their real names, only while a file is written.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FROZEN_BETWEEN = 2
"""Parameters that do not train, and count, before each that does."""


class HistoryBuffer:
    def __init__(self, values: list[float]) -> None:
        self._max_length = 1_000_000
        self._log_history = np.array(values)
        self._count_history = np.ones(len(values), dtype=np.int64)
        kinds = (HistoryBuffer.min, HistoryBuffer.max, HistoryBuffer.mean, HistoryBuffer.current)
        self._statistics_methods = {kind.__name__: kind for kind in kinds}

    def min(self) -> None: ...
    def max(self) -> None: ...
    def mean(self) -> None: ...
    def current(self) -> None: ...


class ConfigDict(dict):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return (ConfigDict, (dict(self),), None, None, None)


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dtype = torch.bfloat16


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclasses.dataclass
class fragment_address:
    numel: int
    start: int


STAND_INS = {
    HistoryBuffer: "mmengine.logging.history_buffer",
    ConfigDict: "mmengine.config.config",
    LossScaler: "deepspeed.runtime.fp16.loss_scaler",
    ZeroStageEnum: "deepspeed.runtime.zero.config",
    fragment_address: "deepspeed.utils.tensor_fragment",
}


@contextmanager
def installed() -> Iterator[None]:
    """Have mmengine and DeepSpeed as far as pickle looks at them."""
    made = []
    for kind, name in STAND_INS.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            if (full := ".".join(parts[:end])) not in sys.modules:
                sys.modules[full] = ModuleType(full)
                made.append(full)
        setattr(sys.modules[name], kind.__name__, kind)
        kind.__module__ = name
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


Weights = Mapping[str, Tensor]
Moments = Mapping[str, Mapping[str, Tensor]]
"""By XTuner's names; a weight that had no gradient has none."""


def in_order(names: Any) -> list[str]:
    """Return the names in the order of the parameters of XTuner's model."""
    return [name for part in ("llm.", "visual_encoder.", "projector.") for name in names if name.startswith(part)]


def client_state(config: str, iteration: int, last_iteration: int) -> dict[str, Any]:
    """Return what XTuner saves whatever holds the weights."""
    return {
        "meta": {"epoch": 0, "iter": iteration, "cfg": config, "seed": 0, "experiment_name": "x", "time": "y"},
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": HistoryBuffer([2.5] * iteration)}),
            "runtime_info": OrderedDict(
                iter=iteration, max_iters=last_iteration, lr=np.float64(0.5), ok=np.bool_(True)
            ),
            "resumed_keys": OrderedDict(),
        },
        "param_schedulers": [
            {"begin": 0, "end": 2, "by_epoch": False, "base_values": [1e-3], "_global_step": iteration},
            {"begin": 2, "end": last_iteration, "by_epoch": False, "T_max": last_iteration - 2},
        ],
    }


def write_iter(path: Path, weights: Weights, moments: Moments, extra: Mapping[str, Any]) -> Path:
    """Write iter_N.pth: the tower first in the file, the LLM's parameters first in the optimizer, if there is one."""
    state: dict[int, Any] = {}
    for number, name in enumerate(in_order(weights)):
        if name in moments:
            state[number * (FROZEN_BETWEEN + 1) + FROZEN_BETWEEN] = dict(moments[name])
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "params": list(range(len(weights) * (FROZEN_BETWEEN + 1)))}
    ordered: Any = OrderedDict(sorted(weights.items(), key=lambda item: not item[0].startswith("visual_encoder.")))
    ordered._metadata = OrderedDict({"": {"version": 1}})
    optimizer = {"optimizer": {"state": state, "param_groups": [group]}} if moments else {}
    content = {"state_dict": ordered, **optimizer, **extra}
    with installed():
        torch.save(content, path)
    return path


def write_zero12(
    folder: Path, weights: Weights, moments: Moments, extra: Mapping[str, Any], *, ranks: int, dtype: torch.dtype
) -> Path:
    """Write a ZeRO-1/2 folder: all that trains end to end, padded, and cut into one piece a rank."""
    folder.mkdir(parents=True)
    names = in_order(weights)
    shapes = OrderedDict((name, weights[name].shape) for name in names)

    def line(kind: str) -> Tensor:
        tensors = (
            weights if kind == "weight" else {name: one.get(kind) for name, one in _filled(weights, moments).items()}
        )
        flat = torch.cat([tensors[name].flatten() for name in names])  # type: ignore[union-attr]
        return torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])

    used = sum(weights[name].numel() for name in names)
    lines = {kind: line(kind).chunk(ranks) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    size = lines["weight"][0].numel()
    module = OrderedDict((name, weight.to(dtype)) for name, weight in weights.items())
    model = {"module": module, "param_shapes": [shapes], "dp_world_size": ranks, "optimizer": None, **_ds(extra)}
    prefix = "bf16_" if dtype is torch.bfloat16 else ""
    with installed():
        torch.save(model, folder / "mp_rank_00_model_states.pt")
        for rank in range(ranks):
            state = {
                "step": _step(moments),
                **{kind: lines[kind][rank].clone() for kind in ("exp_avg", "exp_avg_sq")},
            }
            zero = {
                "loss_scaler": LossScaler(),
                "overflow": False,
                "zero_stage": ZeroStageEnum.gradients,
                "partition_count": [ranks],
                "group_paddings": [0],
                "base_optimizer_state": {"state": {0: state}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
                "single_partition_of_fp32_groups": [lines["weight"][rank][: max(used - rank * size, 0)].clone()],
                "param_slice_mappings": [OrderedDict({names[0]: fragment_address(3, 0)})],
            }
            content = {"optimizer_state_dict": zero, "ds_config": ConfigDict(a=1), "ds_version": "0.14"}
            torch.save(content, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def write_zero3(
    folder: Path, weights: Weights, moments: Moments, extra: Mapping[str, Any], *, ranks: int, subgroups: int
) -> Path:
    """Write a ZeRO-3 folder: each weight cut into one piece a rank, in several subgroups."""
    folder.mkdir(parents=True)
    names = in_order(weights)
    shapes = OrderedDict((name, weights[name].shape) for name in names)
    filled = _filled(weights, moments)

    def piece(tensor: Tensor, rank: int) -> Tensor:
        size = -(-tensor.numel() // ranks)
        flat = torch.cat([tensor.flatten(), torch.full((size * ranks - tensor.numel(),), 7.0)])
        return flat[rank * size : (rank + 1) * size]

    groups = [list(part) for part in np.array_split(np.array(names), subgroups)]
    module = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in weights)
    with installed():
        for rank in range(ranks):
            model = {"module": module, "param_shapes": [shapes], "dp_world_size": ranks, **_ds(extra)}
            torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            states = {
                number: {
                    "step": _step(moments),
                    **{
                        kind: torch.cat([piece(filled[name][kind], rank) for name in group])
                        for kind in ("exp_avg", "exp_avg_sq")
                    },
                }
                for number, group in enumerate(groups)
            }
            flat = [torch.cat([piece(weights[name], rank) for name in group]) for group in groups]
            zero = {
                "zero_stage": ZeroStageEnum.weights,
                "loss_scaler": LossScaler(),
                "partition_count": ranks,
                "optimizer_state_dict": {"state": states, "param_groups": [{"lr": 1e-3, "params": [0]}]},
                "fp32_flat_groups": [torch.nn.Parameter(one) for one in flat],
            }
            path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": zero, "ds_config": {}, "ds_version": "0.14"}, path)
    return folder


def _filled(weights: Weights, moments: Moments) -> dict[str, Mapping[str, Tensor]]:
    """DeepSpeed keeps zeros for what had no gradient."""
    return {
        name: moments.get(name) or {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
        for name, weight in weights.items()
    }


def _step(moments: Moments) -> Tensor:
    return next(iter(moments.values()))["step"].clone()


def _ds(extra: Mapping[str, Any]) -> dict[str, Any]:
    ds_config = ConfigDict(zero_optimization=ConfigDict(stage=2, overlap_comm=True), bf16={"enabled": True})
    return {**extra, "ds_config": ds_config, "ds_version": "0.14", "global_steps": 10, "buffer_names": set()}
