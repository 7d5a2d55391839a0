"""Whatever a run stands on has another fingerprint when its content is another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dianjing.data.dataset import Dataset, open_dataset
from dianjing.model.build import build
from dianjing.run.fingerprints import SUBJECTS, base_fingerprint, fingerprints, weights_fingerprint
from tests.tiny import TinyDataset


@pytest.fixture
def dataset(make_recipe: Any) -> Dataset:
    recipe = make_recipe()
    built = build(recipe)
    return open_dataset(recipe.data, built.encoder, built.image_processor)


def flip(path: Path) -> None:
    """Change a bit in the middle of a file; its size and its times stay."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES = [
    ("llm", "model.safetensors", {"language_model"}),
    ("llm", "config.json", {"language_model"}),
    ("llm", "tokenizer.json", {"language_model", "tokenizer"}),
    ("llm", "tokenizer_config.json", {"tokenizer"}),
    ("clip", "model.safetensors", {"vision_tower"}),
    ("clip", "preprocessor_config.json", {"preprocessing"}),
    ("images", "wide.png", {"pictures"}),
]


@pytest.mark.parametrize(
    ("folder", "name", "changed"),
    CHANGES,
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else value,
)
def test_a_changed_bit_is_seen_and_named(
    tiny_llm: Path,
    tiny_clip: Path,
    tiny_dataset: TinyDataset,
    dataset: Dataset,
    tmp_path: Path,
    folder: str,
    name: str,
    changed: set[str],
) -> None:
    llm, clip = (shutil.copytree(path, tmp_path / kind) for kind, path in (("llm", tiny_llm), ("clip", tiny_clip)))
    before = fingerprints(llm, clip, dataset)
    assert before.keys() == SUBJECTS.keys()
    assert fingerprints(llm, clip, dataset) == before
    path = (tiny_dataset.images if folder == "images" else tmp_path / folder) / name
    flip(path)
    after = fingerprints(llm, clip, dataset)
    flip(path)  # pictures are other tests' too
    assert {subject for subject in before if before[subject] != after[subject]} == changed


def test_a_file_of_another_name_or_length_is_another(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1" * 9000)
    found = [base_fingerprint(tmp_path)]
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    found.append(base_fingerprint(tmp_path))
    (tmp_path / "b.safetensors").write_bytes(b"1" * 9001)
    found.append(base_fingerprint(tmp_path))
    assert len(set(found)) == 3


def test_weights_by_their_numbers_not_their_dtype_or_order() -> None:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}
    same = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(6.0).reshape(3, 2).T.T.reshape(2, 3)}
    assert weights_fingerprint(weights) == weights_fingerprint(same)
    others = [{**weights, "b": torch.tensor([1.0, 1.0001])}, {**weights, "a": weights["a"].reshape(3, 2)}]
    assert len({weights_fingerprint(one) for one in (weights, *others)}) == 3
