"""The weight files of a Hugging Face model folder, read as data."""

from __future__ import annotations

import os.path
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.config import read_object
from dianjing.formats.folder_kind import damage, is_pointer

LFS_FAULT = "a git-lfs pointer, not the weights; fetch them with `git lfs pull`"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""The first that is there is read, whole or in the shards that its index names."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a folder: safetensors, and only without them pytorch_model*.bin.

    Raises:
        ModelError: there are no weights, or their index names files that are missing or outside the folder.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _whole([folder / name])
        if index.is_file():
            return _whole(_shards(index))
    for name in WEIGHT_FILES:
        stem, _, suffix = name.partition(".")
        if shards := sorted(one.name for one in folder.glob(f"{stem}-*-of-*.{suffix}")):
            raise ModelError(
                f"{folder}: {len(shards)} shards are there ({shards[0]}, ...), but not their index, {name}.index.json; "
                "download it too"
            )
    raise ModelError(f"{folder}: it has no weights; put {' or '.join(WEIGHT_FILES)} there, or shards with their index")


def _whole(files: list[Path]) -> list[Path]:
    """Refuse files of safetensors that are cut short or only stand for the file, before any is read."""
    for path in files:
        problem = damage(path) if path.suffix == ".safetensors" else LFS_FAULT if is_pointer(path) else ""
        if problem:
            raise ModelError(f"{path}: {problem}")
    return files


def _shards(index: Path) -> list[Path]:
    weight_map = read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{index}: it has no weight_map from tensors to files; copy it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index}: {outside[0]!r} is not a file of this folder; files elsewhere are not read")
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise ModelError(f"{index}: {name_some(missing)} not there; copy the folder again")
    return [index.parent / name for name in names]


def read_weights(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder's weight files whose name is wanted.

    Raises:
        ModelError: a file is damaged, is a pickle of more than tensors, or holds what another one holds too.
    """
    holders: dict[str, str] = {}
    for path in weight_files(folder):
        for name, weight in _read_file(path, wanted):
            if name in holders:
                raise ModelError(f"{path}: {name} is also in {holders[name]}; copy the folder again")
            holders[name] = path.name
            yield name, weight


def _read_file(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        yield from ((name, weight) for name, weight in _unpickle(path).items() if wanted(name))
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in filter(wanted, file.keys()):
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ModelError(f"{path}: damaged: {error}; copy it again") from None


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .bin file; torch's restricted unpickler calls nothing that the file names."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle protocol other than torch's own
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what torch raises for a broken file depends on where it is broken
        if type(error).__name__ != "UnpicklingError":
            raise ModelError(f"{path}: damaged, or not a file of tensors: {error}; copy it again") from None
        raise ModelError(
            f"{path}: refused: to be read it asks for {_asked_for(path, str(error))}, and a file that asks for more "
            "than tensors may run any program. Nothing was run; get safetensors, from a source you trust"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise ModelError(f"{path}: it does not hold a table of tensors by name")
    return content


def _asked_for(path: Path, complaint: str) -> str:
    """Return the name for which torch refused a pickle; where torch does not say it, the first one in the file."""
    if named := re.search(r"GLOBAL ([\w.]+)", complaint):
        return named[1]
    names: list[str] = []
    texts: list[str | None] = []
    memo: list[str | None] = []
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()):  # looks, and calls nothing
            if operation.name == "MEMOIZE":
                memo.append(texts[-1])
                continue
            if operation.name == "GLOBAL":
                names.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                module, name = [text for text in texts if text is not None][-2:]
                names.append(f"{module}.{name}")
            known: object = memo[int(str(argument))] if operation.name in ("BINGET", "LONG_BINGET") else argument
            texts.append(known if isinstance(known, str) else None)
    except (IndexError, ValueError):
        pass
    strange = [name for name in names if not name.startswith(("torch.", "collections."))]
    return strange[0] if strange else "something other than tensors"


def name_some(names: Iterable[str]) -> str:
    """Return the first three names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
