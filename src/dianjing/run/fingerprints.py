"""SHA-256 of each input of a run, so that a resume with another input is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dianjing.data.dataset import Dataset
from dianjing.data.survey import image_folder

HASHED = "config.json and tokenizer.json whole; of each weight file its size and 256 blocks of 4 KiB spread over it"
"""The files that `base_fingerprint` reads."""
_BLOCKS, _BLOCK_BYTES = 256, 4096
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PREPROCESSING = ("preprocessor_config.json",)
PICTURES = 128
"""Records whose pictures are read, spread over the data."""
PICTURE_BLOCKS = 4

PROJECTOR_START = "projector_start"
"""Name of the fingerprint of the projector before the first step. It is kept, not compared: a resume reads its own."""
SUBJECTS = {
    "language_model": "the base LLM: its weights, config.json or tokenizer.json (language_model.folder)",
    "tokenizer": "the tokenizer or its chat template (language_model.folder)",
    "vision_tower": "the vision tower: its weights or config.json (vision_tower.folder)",
    "preprocessing": "the preprocessor_config.json of the vision tower (vision_tower.folder)",
    "pictures": "the pictures: other content under the same names (data.images)",
}
"""Name of a fingerprint -> its subject, and the field of the recipe that says where it is."""


def fingerprints(language_model: Path, vision_tower: Path, dataset: Dataset | None) -> dict[str, str]:
    """Return the fingerprint of each of SUBJECTS; pictures only with a data set.

    Texts and answers have their own, `Dataset.fingerprint`.
    """
    found = {
        "language_model": base_fingerprint(language_model),
        "tokenizer": _whole(language_model, TOKENIZER),
        "vision_tower": base_fingerprint(vision_tower),
        "preprocessing": _whole(vision_tower, PREPROCESSING),
    }
    return found | ({"pictures": _pictures(dataset)} if dataset else {})


def changed_inputs(saved: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return those of SUBJECTS that are known of both sides and differ."""
    known = saved.keys() & now.keys()
    return {name: subject for name, subject in SUBJECTS.items() if name in known and saved[name] != now[name]}


def base_fingerprint(folder: Path) -> str:
    """Return a SHA-256 of a base model, over what HASHED says: cheap, and different for different weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        for block in _blocks(path, _BLOCKS):
            digest.update(block)
    return digest.hexdigest()


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over all numbers of some weights, in fp32."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _whole(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in (folder / name for name in names):
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}".encode() + content)
    return digest.hexdigest()


def _pictures(dataset: Dataset) -> str:
    """Return a SHA-256 over a sample of the pictures: all of them would take as long as a part of the training."""
    digest = hashlib.sha256()
    number = dataset.num_records
    for index in range(0, number, max(1, number // PICTURES)):
        record = dataset.records[index]
        for name in record.images:
            path = Path(image_folder(dataset.config, record.source), name)
            digest.update(f"{name} {path.stat().st_size}".encode())
            for block in _blocks(path, PICTURE_BLOCKS):
                digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, number: int) -> Iterator[bytes]:
    """Yield blocks of a file, the first at its start and the last at its end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        for block in range(number):
            file.seek(block * max(size - _BLOCK_BYTES, 0) // (number - 1), os.SEEK_SET)
            yield file.read(_BLOCK_BYTES)
