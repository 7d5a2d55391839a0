"""A path -> the checkpoint from elsewhere that lies there, whichever of the known forms it has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dianjing.errors import ModelError
from dianjing.formats.checkpoint import Adapter, Foreign
from dianjing.formats.deepspeed import is_deepspeed, read_deepspeed
from dianjing.formats.llava import is_llava, recipe_fields, xtuner_names
from dianjing.formats.pickle import read_checkpoint
from dianjing.formats.weights import name_some
from dianjing.formats.xtuner import PROJECTOR, moments_by_name
from dianjing.formats.xtuner_config import require_plain_lora

PICKLES = (".pth", ".pt", ".bin")
CONFIG = "xtuner_config.py"
POINTERS = ("last_checkpoint", "latest")
"""Files of mmengine and of DeepSpeed that name the newest checkpoint of their folder."""
LARGEST_SEED = 2**32
"""numpy's, which every seed of XTuner has gone through."""
MOST_ITERATIONS = 2**63
KNOWN = (
    "an XTuner checkpoint (iter_N.pth, file or DeepSpeed folder), a folder that `xtuner convert pth_to_hf` wrote, "
    "LLaVA's mm_projector.bin or a LLaVA folder"
)


def open_foreign(path: Path, *, optimizer: bool = True) -> Foreign:
    """Return the checkpoint at `path`; tensors are read when they are looked at.

    Raises:
        ModelError: no checkpoint of a known form is there, or it is damaged or unsafe.
    """
    try:
        return _open(path, optimizer, POINTERS)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}; give {KNOWN}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: not made as XTuner or LLaVA make theirs ({reason}); give {KNOWN}") from None


def _open(path: Path, optimizer: bool, pointers: Sequence[str]) -> Foreign:
    if not path.exists():
        raise ModelError(f"{path}: no such file or folder; give {KNOWN}")
    return _open_file(path, optimizer) if path.is_file() else _open_folder(path, optimizer, pointers)


def _open_folder(path: Path, optimizer: bool, pointers: Sequence[str]) -> Foreign:
    if is_deepspeed(path):
        return _open_deepspeed(path)
    for file, open_form in FORMS.items():
        if (path / file).exists():
            return open_form(path)
    for pointer in pointers:
        if (path / pointer).is_file():
            # What it names leads no further, or it could lead round and round.
            return _open(path / _named_in(path / pointer), optimizer, ())
    if any(path.glob("*_optim_states.pt")):
        raise ModelError(f"{path}: a DeepSpeed folder without its *_model_states.pt; copy the whole folder")
    if checkpoints := [file.name for file in path.glob("*.pth")]:
        raise ModelError(
            f"{path}: no {POINTERS[0]} in it says which checkpoint is meant; give one of those that are there: "
            f"{name_some(checkpoints)}"
        )
    raise ModelError(f"{path}: no checkpoint of a known form is in it; give {KNOWN}")


def _named_in(pointer: Path) -> str:
    """Return the name of the file that a pointer names; its folder, on another machine, is ignored."""
    newest = PureWindowsPath(pointer.read_text(encoding="utf-8").strip()).name
    if newest in ("", ".."):
        raise ModelError(f"{pointer}: it names no checkpoint; give the checkpoint itself")
    return newest


def _open_file(path: Path, optimizer: bool) -> Foreign:
    if path.suffix == ".safetensors":
        return Foreign(kind="XTuner weights", weights=_in_xtuner_names(_read_safetensors(path), path))
    if path.suffix not in PICKLES:
        raise ModelError(f"{path}: neither .safetensors nor {', '.join(PICKLES)}; give {KNOWN}")
    if path.name.endswith("_states.pt"):
        raise ModelError(f"{path}: one file of a DeepSpeed checkpoint; give its folder, {path.parent}")
    content = read_checkpoint(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        return _xtuner(path, content, content["state_dict"], optimizer)
    weights = _in_xtuner_names(_tensors(content, path), path)
    found = Foreign(kind="weights", weights=weights)
    config = path.parent / "config.json"
    return replace(found, settings=recipe_fields(_read_json(config), config)) if config.is_file() else found


def _xtuner(path: Path, content: Mapping[str, Any], state: Mapping[str, Any], optimizer: bool) -> Foreign:
    weights = _in_xtuner_names(_tensors(state, path), path)
    found = _with_meta(Foreign(kind="XTuner checkpoint", weights=weights), content)
    if not optimizer or not isinstance(content.get("optimizer"), dict):
        return found
    return replace(found, moments=moments_by_name(content["optimizer"], weights, path))


def _open_deepspeed(path: Path) -> Foreign:
    read = read_deepspeed(path)
    found = Foreign(
        kind=f"XTuner checkpoint, DeepSpeed on {read.ranks} ranks",
        weights=_in_xtuner_names(read.weights, path),
        moments=read.moments,
        ranks=read.ranks,
    )
    return _with_meta(found, read.extra)


def _with_meta(found: Foreign, content: Mapping[str, Any]) -> Foreign:
    meta = content.get("meta") or {}
    info = (content.get("message_hub") or {}).get("runtime_info") or {}
    schedules = content.get("param_schedulers") or []
    ends = [schedule["end"] for schedule in schedules if isinstance(schedule, dict) and "end" in schedule]
    iteration, seed = int(meta.get("iter", info.get("iter", 0))), meta.get("seed", info.get("seed"))
    config = meta.get("cfg") or info.get("cfg") or ""
    if not 0 <= iteration < MOST_ITERATIONS:
        raise ValueError("its iteration is not a number of batches")
    if not 0 <= int(seed or 0) < LARGEST_SEED:
        raise ValueError(f"its seed is not between 0 and {LARGEST_SEED:,}")
    if not isinstance(config, str):
        raise TypeError(f"its config is a {type(config).__name__}, not text")
    return replace(
        found,
        iteration=iteration,
        seed=None if seed is None else int(seed),
        config=config,
        last_iteration=max(map(int, ends), default=int(info.get("max_iters") or 0)),
    )


def _open_converted(folder: Path) -> Foreign:
    """Read the output of `xtuner convert pth_to_hf`."""
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Adapter] = {}
    settings: dict[str, Any] = {}
    for part, base in (("llm", "language_model.folder"), ("visual_encoder", "vision_tower.folder")):
        adapter = folder / f"{part}_adapter"
        if adapter.is_dir():
            adapters[part], settings[base] = _read_adapter_config(adapter)
            weights |= {f"{part}.{_with_default(name)}": weight for name, weight in _read_folder(adapter).items()}
    if (folder / "visual_encoder").is_dir():
        tower = _read_folder(folder / "visual_encoder")
        weights |= {f"visual_encoder.{name}": weight for name, weight in tower.items()}
    if (folder / "config.json").is_file():
        weights |= {f"llm.{name}": weight for name, weight in _read_folder(folder).items()}
    weights |= {f"projector.{name}": weight for name, weight in _read_folder(folder / "projector").items()}
    config = folder / CONFIG
    return Foreign(
        kind="model that XTuner converted",
        weights=_in_xtuner_names(weights, folder),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        adapters=adapters,
        settings={name: value for name, value in settings.items() if value},
    )


def _open_llava_lora(folder: Path) -> Foreign:
    alpha, base = _read_adapter_config(folder)
    weights = {
        **xtuner_names(_read_folder(folder)),
        **xtuner_names(_tensors(read_checkpoint(folder / "non_lora_trainables.bin"), folder)),
    }
    return Foreign(
        kind="LLaVA LoRA",
        weights=weights,
        adapters={"llm": alpha},
        settings={
            **recipe_fields(_read_json(folder / "config.json"), folder / "config.json"),
            **({"language_model.folder": base} if base else {}),
        },
    )


def _open_llava_projector(folder: Path) -> Foreign:
    return _open_file(folder / "mm_projector.bin", optimizer=False)


def _open_llava(folder: Path) -> Foreign:
    config = _read_json(folder / "config.json")
    weights = _read_folder(folder)
    if not any(map(is_llava, weights)):
        raise ModelError(f"{folder}: a model, but no LLaVA of haotian-liu's: it has no mm_projector; give {KNOWN}")
    return Foreign(kind="LLaVA", weights=xtuner_names(weights), settings=recipe_fields(config, folder / "config.json"))


FORMS: dict[str, Callable[[Path], Foreign]] = {
    "projector": _open_converted,
    "non_lora_trainables.bin": _open_llava_lora,
    "mm_projector.bin": _open_llava_projector,
    "config.json": _open_llava,
}
"""A file that each form of folder has -> its reader; the first file found decides."""


def _in_xtuner_names(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    if any(map(is_llava, weights)):
        return xtuner_names(weights)
    if not any(name.startswith((PROJECTOR, "llm.", "visual_encoder.")) for name in weights):
        first = next(iter(weights), "nothing")
        raise ModelError(f"{path}: no weights of a LLaVA are in it (it begins with {first}); give {KNOWN}")
    return dict(weights)


def _with_default(name: str) -> str:
    """Return the name of an adapter's tensor as it is within a model: peft leaves the adapter's name out of files."""
    return name.replace(".lora_A.weight", ".lora_A.default.weight").replace(".lora_B.weight", ".lora_B.default.weight")


def _read_adapter_config(folder: Path) -> tuple[Adapter, str]:
    config = _read_json(folder / "adapter_config.json")
    require_plain_lora(config, str(folder / "adapter_config.json"))
    adapter = Adapter(alpha=float(config["lora_alpha"]), dropout=float(config.get("lora_dropout") or 0))
    return adapter, str(config.get("base_model_name_or_path") or "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; copy the whole folder") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, not a {type(content).__name__}")
    return content


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder: of its *.safetensors, or else of its *.bin."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted({*folder.glob("pytorch_model*.bin"), *folder.glob("adapter_model*.bin")})
    if not files and not pickles:
        raise ModelError(f"{folder}: it holds no weights, neither *.safetensors nor *.bin; copy the whole folder")
    read = [_read_safetensors(file) for file in files] or [_tensors(read_checkpoint(file), file) for file in pickles]
    return {name: weight for weights in read for name, weight in weights.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged: {error}; copy it again") from None


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """Return a state dict; anything else is refused."""
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: no weights are in it, but a {type(content).__name__}; give {KNOWN}")
    for name, weight in content.items():
        if not isinstance(name, str) or not isinstance(weight, Tensor):
            raise ModelError(f"{path}: {name!r} in it is a {type(weight).__name__}, not a tensor; give {KNOWN}")
    return content
