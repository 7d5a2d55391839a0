"""A folder that is not one of a model -> what it is instead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs"
SUBFOLDERS_NAMED = 3
TAKEN_APART = ("llava", "llava_next")
"""LLaVAs in transformers' layout, whose LLM and tower are read out of them."""
OWN_CODE = ("llava", "mipha", "bunny", "cobra")
"""In the model_type of LLaVAs that transformers does not know."""


def wrong_folder(folder: Path) -> str:
    """Return what a folder is that is not one of a Hugging Face model, with what to give; "" when it may be one."""
    config = folder / "config.json"
    return next(_without_config(folder), "") if not config.is_file() else next(_by_config(config), "")


def _without_config(folder: Path) -> Iterator[str]:
    if (folder / "adapter_config.json").is_file():
        base = _object(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if base else ""
        yield f"a LoRA adapter{of}, not a model; give the folder of the base model, or merge the adapter into it first"
    if ggufs := sorted(folder.glob("*.gguf")):
        yield f"it holds GGUF files; make a folder of one: dianjing import {ggufs[0]} models/{ggufs[0].stem}"
    if (folder / "snapshots").is_dir():
        found = sorted(one for one in (folder / "snapshots").iterdir() if (one / "config.json").exists())
        yield f"a folder of the hub's cache; give {found[-1] if found else 'a whole one under snapshots/'}"
    if any(folder.glob("open_clip*")):
        yield "a model of open_clip, whose layout is not read; give the same tower in transformers' layout"
    if any(folder.glob("consolidated*")) and (folder / "params.json").is_file():
        yield "weights in the layout of their makers (params.json); give the folder in transformers' layout"
    inside = sorted(one.parent for one in folder.glob("*/config.json"))
    if inside:
        named = ", ".join(map(str, inside[:SUBFOLDERS_NAMED])) + (", ..." if len(inside) > SUBFOLDERS_NAMED else "")
        yield f"there is no config.json in it, but in folders within it; give one of them: {named}"


def _by_config(config: Path) -> Iterator[str]:
    if is_pointer(config):
        yield "its files are git-lfs pointers, not the files themselves; fetch them with `git lfs pull`"
    fields = _object(config)
    if "pretrained_cfg" in fields and "architecture" in fields:
        name = fields["architecture"]
        yield f"a model of timm ({name}), whose layout is not read; give the same tower in transformers' layout"
    if "model_cfg" in fields:
        yield "a model of open_clip, whose layout is not read; give the same tower in transformers' layout"
    if fields and not fields.get("model_type") and not fields.get("architectures"):
        yield "its config.json has no model_type; give the folder of a model in transformers' layout"


def eyes_already(folder: Path) -> str:
    """Return what is wrong with a LLaVA where its LLM or its tower is needed; "" for a folder of another kind."""
    fields = _object(folder / "config.json")
    kind = str(fields.get("model_type") or "")
    if kind in TAKEN_APART or not any(name in kind for name in OWN_CODE):
        return ""
    tower = fields.get("mm_vision_tower") or fields.get("vision_model_name_or_path")
    of = f" (its tower: {tower})" if tower else ""
    return (
        f'a LLaVA, which has eyes already (model_type "{kind}"){of}; give a text LLM and a vision tower by '
        "themselves, or import it"
    )


def is_pointer(path: Path) -> bool:
    """Return whether a file is what git leaves in place of a large one."""
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def damage(path: Path) -> str:
    """Return what is wrong with a file of safetensors as a whole, with what to do; "" when it is as long as it says."""
    size = path.stat().st_size
    if is_pointer(path):
        return "a git-lfs pointer, not the weights; fetch them with `git lfs pull`"
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start[:1] == b"<":
            return "a web page, not weights; download it again"
        if len(start) < 8 or length > size - 8:
            return f"cut short ({size:,} bytes); download it again"
        try:
            header: Any = json.loads(file.read(length))
            ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
            return "not safetensors; copy it again"
    return f"cut short ({size:,} of {whole:,} bytes); download it again" if size < whole else ""


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
