"""Weights and JSON files, as several formats write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from dianjing.errors import ExportError

SHARD_SIZE = "5GB"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to begin to write what will not fit.

    Raises:
        ExportError: the disk has too little room; both numbers are named.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ExportError(
            f"{folder}: the export takes {needed_bytes:,} bytes, but only {free:,} are free on this disk; make room "
            "or choose another place"
        )


def save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights as safetensors, in several files and an index where they are large."""
    require_space(folder, sum(weight.nbytes for weight in weights.values()))
    plan = split_torch_state_dict_into_shards(dict(weights), max_shard_size=SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
