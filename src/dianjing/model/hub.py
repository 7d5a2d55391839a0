"""owner/name on the Hugging Face hub -> a folder in its cache that holds data files only."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dianjing.errors import ModelError

ONLINE = "DIANJING_ONLINE"
"""Set by the command line where HF_HUB_OFFLINE is its own precaution and not the user's wish."""
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA = (".json", ".model", ".txt", ".jinja")
"""The files fetched with the weights. Nothing that could run is."""
WEIGHTS = (re.compile(r"model(-\d+-of-\d+)?\.safetensors"), re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin"))
"""Files with weights; the second kind only where the first is not there."""


def is_hub_name(folder: str) -> bool:
    """Return whether a text can only be a model on the hub: owner/name, where `owner` is not a folder here."""
    return bool(NAME.fullmatch(folder)) and not Path(folder.split("/")[0]).is_dir()


def hub_folder(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a model of the hub, from the cache if it is whole there, else downloaded.

    Raises:
        ModelError: it is not in the cache and cannot be downloaded.
    """
    # Imported here because it takes long, and few need it.
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
        if _is_whole(cached, weights=weights):
            return cached
    except LocalEntryNotFoundError:
        pass
    if is_offline_mode() and os.environ.get(ONLINE) != "1":
        raise ModelError(
            f"{name}: no such folder, and no such model in the hub's cache, which is all there is offline "
            f"(HF_HUB_OFFLINE is set); give a folder, or download it first: hf download {name}"
        )
    try:
        with _online():
            return _download(name, weights=weights)
    except ModelError:
        raise
    except Exception as error:  # of the hub's HTTP library, which has changed before
        raise ModelError(f"{name}: no such folder, and the hub does not give it: {_reason(error)}") from None


@contextmanager
def _online() -> Iterator[None]:
    """Let huggingface_hub reach the hub, which it may at no other time."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_whole(folder: Path, *, weights: bool) -> bool:
    """Return whether what a model needs is there; a download may have been stopped, or have been of some files."""
    names = {path.name for path in folder.iterdir()}
    described = "config.json" in names and names & {"tokenizer.json", "tokenizer.model", "preprocessor_config.json"}
    if not described or not weights:
        return bool(described)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in names:
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return names.issuperset(shards)
    return bool(names & {"model.safetensors", "pytorch_model.bin"})


def _download(name: str, *, weights: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """A progress bar of bytes, shown even where other libraries' bars are not."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings | {"disable": settings.get("unit") != "B"})

    info = HfApi().model_info(name, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _wanted(list(sizes), weights=weights)
    if "config.json" not in wanted:
        raise ModelError(f"{name}: the hub has it, but there is no config.json in it; name a model for transformers")
    size = sum(sizes[file] for file in wanted)
    amount = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    print(f"downloading {name} ({amount}) to the hub cache {constants.HF_HUB_CACHE}", file=sys.stderr, flush=True)
    return Path(snapshot_download(name, allow_patterns=wanted, tqdm_class=Bar))


def _wanted(files: Sequence[str], *, weights: bool) -> list[str]:
    """Return the files to fetch: those of the top folder that are data, and one kind of weights."""
    top = [file for file in files if "/" not in file]
    found = next((kind for kind in WEIGHTS if any(kind.fullmatch(file) for file in top)), None) if weights else None
    return [file for file in top if file.endswith(DATA) or (found and found.fullmatch(file))]


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "its owner wants to be asked first; ask on its page, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "there is none of this name that you may see; check the name, or log in: hf auth login"
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}; check the network, or give a folder on this machine"
