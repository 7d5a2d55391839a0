"""This machine and what is installed on it -> findings, with a way out for each that is not well."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import torch
from packaging.requirements import Requirement

from dianjing.data.cache import cache_folder
from dianjing.model.stage import in_units

State = Literal["well", "optional", "wrong"]
IMPORT_SECONDS = 60
CACHES = ("data", "serve")
"""Names of the folders that can be deleted at any time."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the screen."""

    subject: str
    state: State
    """"optional" = missing, and needed for some things only."""
    words: str


def packages() -> Iterator[Finding]:
    """Yield a finding for each package that Dianjing needs, and one for each extra."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requires("dianjing") or ()):
        if requirement.marker is None:
            yield _needed(requirement)
        elif (extra := _extra(requirement)) and extra != "dev":
            extras.setdefault(extra, []).append(requirement)
    for extra, wanted in sorted(extras.items()):
        missing = [one.name for one in wanted if not _installed(one.name)]
        old = [f"{one.name} {_installed(one.name)}" for one in wanted if one.name not in missing and not _fits(one)]
        install = f"pip install 'dianjing[{extra}]'"
        if old:
            yield Finding(subject=f"extra {extra}", state="wrong", words=f"{', '.join(old)}: too old; {install}")
        elif missing:
            words = f"not installed ({', '.join(missing)}); {install}"
            yield Finding(subject=f"extra {extra}", state="optional", words=words)
        else:
            words = ", ".join(f"{one.name} {_installed(one.name)}" for one in wanted)
            yield Finding(subject=f"extra {extra}", state="well", words=words)


def conflicts() -> Iterator[Finding]:
    """Yield a finding for packages that are known to break others."""
    if not importlib.util.find_spec("torchvision"):
        return
    command = [sys.executable, "-c", "import torchvision.ops; torchvision.ops.nms"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
        reason = "" if tried.returncode == 0 else (tried.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"it takes more than {IMPORT_SECONDS} seconds to import"
    if reason:
        words = f"{reason}; transformers cannot read processors with it: pip uninstall torchvision (it is not needed)"
        yield Finding(subject="torchvision", state="wrong", words=words)
    else:
        yield Finding(subject="torchvision", state="well", words=f"{_installed('torchvision')} (not needed)")


def device() -> Iterator[Finding]:
    """Yield what there is to compute with, and what is chosen on it."""
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}, but finds no GPU" if torch.version.cuda else "no GPU"
        cores = len(os.sched_getaffinity(0))
        words = f"{built}; {cores} CPU cores, {torch.get_num_threads()} used"
        yield Finding(subject="device", state="well", words=words)
        words = "attention record by record (sdpa); layers as transformers has them, fused with train.compile on"
        yield Finding(subject="kernels", state="well", words=words)
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        words = f"{about.name}, {in_units(about.total_memory)}, compute capability {about.major}.{about.minor}"
        yield Finding(subject=f"GPU {number}", state="well", words=f"{words}, CUDA {torch.version.cuda}")
    if importlib.util.find_spec("triton"):
        yield Finding(subject="kernels", state="well", words="fused layers on Triton; attention: torch's varlen kernel")
    else:
        words = "Triton is missing, so layers cannot be fused or compiled: pip install triton"
        yield Finding(subject="kernels", state="wrong", words=words)
    has_bf16, has_fp8 = torch.cuda.is_bf16_supported(), torch.cuda.get_device_capability() >= (8, 9)
    words = f"{'bf16' if has_bf16 else 'fp32 (no bf16 units)'}; fp8 {'can' if has_fp8 else 'cannot'} be used"
    yield Finding(subject="precision", state="well", words=words)


def caches() -> Iterator[Finding]:
    """Yield the sizes of what is kept and can be made again."""
    for name in CACHES:
        folder = cache_folder(name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
        yield Finding(subject=f"cache {name}", state="well", words=f"{in_units(size)} in {folder}")
    writable = _first_that_exists(cache_folder(""))
    if not os.access(writable, os.W_OK):
        words = f"{writable} cannot be written, so each start reads all data again: set XDG_CACHE_HOME"
        yield Finding(subject="cache", state="wrong", words=words)


def _needed(requirement: Requirement) -> Finding:
    found = _installed(requirement.name)
    if found and _fits(requirement):
        return Finding(subject=requirement.name, state="well", words=found)
    words = f"{found or 'not installed'}, but {requirement.specifier} is needed: pip install '{requirement}'"
    return Finding(subject=requirement.name, state="wrong", words=words)


def _fits(requirement: Requirement) -> bool:
    return requirement.specifier.contains(_installed(requirement.name), prereleases=True)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _extra(requirement: Requirement) -> str:
    """Return the extra that asks for a package, "" for none."""
    text = str(requirement.marker)
    return text.rpartition("extra == ")[2].strip("\"'") if "extra == " in text else ""


def _first_that_exists(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
