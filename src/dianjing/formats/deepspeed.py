"""A DeepSpeed checkpoint folder (ZeRO 1, 2 or 3, any number of ranks) -> the fp32 weights and AdamW's state of them.

    iter_500.pth/
        mp_rank_00_model_states.pt                       ZeRO 1 and 2: names, shapes, weights in 16 bits
        bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt   a rank's share of the fp32 weights (fp16 runs: without bf16_)
        zero_pp_rank_1_mp_rank_00_model_states.pt        ZeRO 3: a file a rank, its weights empty

ZeRO 1 and 2 lay all weights end to end and cut the line into one piece a rank; ZeRO 3 cuts each weight.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.pickle import read_checkpoint

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
MODEL_PARALLEL = "*mp_rank_01_*"
MOMENTS = ("exp_avg", "exp_avg_sq")

Pieces = Sequence[Sequence[Tensor]]
"""By group, then by rank: a flat tensor each."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """Content of a folder."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    extra: Mapping[str, Any]
    """Entries of the program that uses DeepSpeed: XTuner's meta and param_schedulers."""
    ranks: int


def is_deepspeed(folder: Path) -> bool:
    """Return whether a folder is a DeepSpeed checkpoint."""
    return any(MODEL_FILE.fullmatch(path.name) for path in folder.glob("*_model_states.pt"))


def read_deepspeed(folder: Path) -> DeepSpeed:
    """Return what a DeepSpeed checkpoint folder holds, put together from all ranks.

    Raises:
        ModelError: a rank's file is missing or damaged, or the files do not fit each other.
    """
    if any(folder.glob(MODEL_PARALLEL)):
        raise ModelError(f"{folder}: of a model-parallel run, which cannot be read; only data-parallel ones can")
    model = _read(_by_rank(folder, MODEL_FILE)[0], dict)
    files = _by_rank(folder, OPTIMIZER_FILE)
    if not files:
        raise ModelError(
            f"{folder}: the *_optim_states.pt files are missing, which hold the weights in fp32; copy the whole folder"
        )
    contents = [_read(file, dict) for file in files]
    try:
        states = [content["optimizer_state_dict"] for content in contents]
        _require_all_ranks(folder, len(files), model, states[0])
        _require_own_shares(files, states)
        _require_same_step(files, states)
        groups = [dict(group) for group in model["param_shapes"]]
        weights, moments = (_zero3 if "fp32_flat_groups" in states[0] else _zero12)(states, groups)
        _require_rounded(folder, model["module"], weights)
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}: the files of its ranks do not fit each other: {error!r}; copy it again") from None
    # What does not train has no fp32 copy: buffers, for example.
    rest = {name: weight for name, weight in model["module"].items() if name not in weights and weight.numel()}
    return DeepSpeed(weights={**weights, **rest}, moments=moments, extra=model, ranks=len(files))


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return a file for each rank.

    Raises:
        ModelError: a rank's is missing, or there are those of two runs.
    """
    matches = [match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    kinds = {match[0].partition("_rank_")[0]: match[0] for match in matches}
    if len(kinds) > 1:
        raise ModelError(
            f"{folder}: {' and '.join(kinds.values())} are of two runs; move the files of one elsewhere, or copy the "
            "folder again into an empty one"
        )
    found = {int(match[1] or 0): folder / match[0] for match in matches}
    missing = sorted(set(range(max(found, default=0))) - found.keys())
    if missing:
        raise ModelError(f"{folder}: the files of rank {', '.join(map(str, missing))} are missing; copy it whole")
    return [found[rank] for rank in sorted(found)]


def _read(path: Path, kind: type) -> Any:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ModelError(f"{path}: cut off or damaged; copy it again")
    content = read_checkpoint(path)
    if not isinstance(content, kind):
        raise ModelError(f"{path}: no DeepSpeed checkpoint: a {type(content).__name__} is in it")
    return content


def _require_all_ranks(folder: Path, found: int, model: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    count = state.get("partition_count", model.get("dp_world_size", found))
    expected = max(count) if isinstance(count, list | tuple) else count
    if found != expected:
        raise ModelError(
            f"{folder}: {found} ranks' *_optim_states.pt are there, but the run had {expected}; copy the whole folder "
            "again into an empty one"
        )
    zero = model.get("ds_config", {}).get("zero_optimization", {})
    if isinstance(zero, Mapping) and zero.get("round_robin_gradients"):
        raise ModelError(f"{folder}: DeepSpeed's round_robin_gradients was on, which shuffles the weights; turn it off")


def _require_own_shares(files: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a rank's file that is a copy of another's: the pieces would fit, and be wrong."""
    kind = "fp32_flat_groups" if "fp32_flat_groups" in states[0] else "single_partition_of_fp32_groups"
    seen: dict[bytes, Path] = {}
    for file, state in zip(files, states, strict=True):
        share = [piece for piece in state[kind] if piece.any()]  # adapters begin as zeros, on any rank
        digest = hashlib.sha256()
        for piece in share:
            digest.update(piece.contiguous().view(torch.uint8).numpy())
        if share and (other := seen.setdefault(digest.digest(), file)) is not file:
            raise ModelError(f"{file}: it holds the same weights as {other.name}; copy the folder again")


def _require_same_step(files: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks' files of different checkpoints: the pieces would fit, and be of no model there ever was."""
    kind = "optimizer_state_dict" if "fp32_flat_groups" in states[0] else "base_optimizer_state"
    steps = [_step(state[kind], 0).item() for state in states]
    for file, step in zip(files, steps, strict=True):
        if step != steps[0]:
            raise ModelError(
                f"{file}: it is of step {step:g}, {files[0].name} of step {steps[0]:g}; copy the folder of one "
                "checkpoint again into an empty one"
            )


def _require_rounded(folder: Path, module: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights in 16 bits that are not those in fp32, rounded either way: one of the two is of another step."""
    for name, half in module.items():
        if name not in weights or not half.numel():  # ZeRO 3's are empty
            continue
        limits = torch.finfo(half.dtype)
        if not half.allclose(weights[name].to(half.dtype), rtol=limits.eps, atol=limits.tiny, equal_nan=True):
            raise ModelError(
                f"{folder}: {name} in *_model_states.pt is not what the *_optim_states.pt have in fp32: they are of "
                "different checkpoints; copy the folder of one again into an empty one"
            )


Groups = list[dict[str, tuple[int, ...]]]
Read = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


def _zero12(states: Sequence[Mapping[str, Any]], groups: Groups) -> Read:
    """Cut the line of each group of parameters where one weight ends and the next begins."""
    optimizers = [state["base_optimizer_state"] for state in states]

    def cut(pieces_of: Callable[[int], list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for number, group in enumerate(groups):
            pieces, start = pieces_of(number), 0
            for name, shape in group.items():
                size = torch.Size(shape).numel()
                yield name, _between(pieces, start, start + size).view(shape)
                start += size

    weights = dict(cut(lambda group: [state["single_partition_of_fp32_groups"][group] for state in states]))
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in weights}
    for kind in MOMENTS:
        for name, value in cut(lambda group: [one["state"][group][kind] for one in optimizers]):  # noqa: B023
            moments[name][kind] = value
    for number, group in enumerate(groups):
        for name in group:
            moments[name]["step"] = _step(optimizers[0], number)
    return weights, moments


def _zero3(states: Sequence[Mapping[str, Any]], groups: Groups) -> Read:
    """Join each weight from the equal pieces, the last one padded, that the ranks have of it."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    optimizers = [state["optimizer_state_dict"] for state in states]
    ranks = len(states)

    def join(lines: list[list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            end = start + -(-size // ranks)
            yield name, torch.cat([_between(line, start, end) for line in lines])[:size].view(shape)
            start = end

    weights = dict(join([list(state["fp32_flat_groups"]) for state in states]))
    moments: dict[str, dict[str, Tensor]] = {name: {"step": _step(optimizers[0], 0)} for name in weights}
    for kind in MOMENTS:
        lines = [[one["state"][number][kind] for number in sorted(one["state"])] for one in optimizers]
        for name, value in join(lines):
            moments[name][kind] = value
    return weights, moments


def _step(optimizer: Mapping[str, Any], group: int) -> Tensor:
    """Return AdamW's count of steps, which torch keeps with the moments, DeepSpeed's own AdamW in the group."""
    states, groups = optimizer["state"], optimizer["param_groups"]
    step = states[group].get("step", groups[min(group, len(groups) - 1)].get("step"))
    return torch.tensor(float(step), dtype=torch.float32)


def _between(pieces: Iterable[Tensor], start: int, end: int) -> Tensor:
    """Return a stretch of the line that the pieces make; a view where it lies in one piece.

    Raises:
        ValueError: the line ends before.
    """
    found: list[Tensor] = []
    begins, wanted = 0, end - start
    for piece in pieces:
        flat = piece.flatten()
        inside = flat[max(start - begins, 0) : max(end - begins, 0)]
        if inside.numel():
            found.append(inside)
        begins += flat.numel()
    if sum(piece.numel() for piece in found) != wanted:
        raise ValueError(f"{begins} numbers, where at least {end} are needed")
    return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)
