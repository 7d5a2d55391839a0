"""A GGUF file with a text LLM -> a Hugging Face folder with the same numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dianjing import __version__
from dianjing.data.encode import load_tokenizer
from dianjing.errors import ConfigError, ModelError, shortened
from dianjing.formats.config import impossible
from dianjing.formats.gguf import Header, read_header
from dianjing.formats.weights import name_some
from dianjing.model.language import count, empty_language_model

RECEIPT = "gguf_receipt.json"
ROUNDED = "the weights stay as the file rounded them; the original's are not in it"
EXACT_TYPES = {"F32", "F16", "BF16"}
TEXTS = ("What is in the picture?", " two  blanks\n\n\tand 3.14 times 12345", "图里有什么？ Où ça? 😀", "<s></s> a")
"""Texts that the tokenizer must cut the same way when it is read back."""

ROPE_FACTORS = "rope_freqs.weight"
"""The divisor of a rotary frequency, in files of Llama 3.1 and later; transformers does not read it."""
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The values of every Llama whose frequencies are divided."""


def import_gguf(source: Path, out: Path) -> list[str]:
    """Write the folder and return what was found, a line each.

    Raises:
        DianjingError: the file cannot be read, is not a text LLM that can be trained here, or `out` exists or cannot
            be written; nothing is left of it then.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out}: already there; remove it or give another name")
    model, tokenizer, header = read_gguf(source)
    dtype = _narrowest(model)
    nn.Module.to(model, dtype)
    rounded = not EXACT_TYPES.issuperset(header.types)
    written = str(dtype).removeprefix("torch.")
    receipt = {
        "source": source.name,
        "sha256": _sha256(source),
        "architecture": header.keys["general.architecture"],
        "tensors_by_type": header.types,
        "written_as": written,
        "note": ROUNDED if rounded else "every number of the file is kept",
        "dianjing": __version__,
        "transformers": transformers.__version__,
    }

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        empty_language_model(folder, dtype)  # refuses what cannot be trained here
        _require_same_ids(tokenizer, folder, source)
        (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")

    _write_whole(out, write)
    types = ", ".join(f"{number} {name}" for name, number in sorted(header.types.items()))
    return [
        f"GGUF: {type(model).__name__}, {count(model)}; tensors by type: {types}",
        f"written as {written}, which holds every number of the file",
        *([ROUNDED] if rounded else []),
        f"receipt: {out / RECEIPT}; the folder is an LLM: language_model.folder, or --llm",
    ]


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Header]:
    """Return the LLM of a file in fp32 as transformers reads it, its tokenizer, and the file's header.

    Raises:
        ModelError: the package gguf is missing, the file is cut or has impossible sizes, or transformers does not
            read this architecture.
    """
    header = read_header(path)
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(**place)
        _require_possible(config, header, path)
        settings: dict[str, Any] = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        if packed := getattr(transformers, "GgufConfig", None):  # newer ones keep the blocks unless asked
            settings["quantization_config"] = packed(dequantize=True)
        load: Any = AutoModelForCausalLM.from_pretrained
        model, info = load(**place, **settings)
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # what transformers raises for a broken file depends on where it is broken
        reason = " ".join(shortened(error).split())
        raise ModelError(
            f"{path}: transformers cannot read it: {type(error).__name__}: {reason}; get the file again, or the "
            "model's Hugging Face folder"
        ) from None
    faults = {"missing": info["missing_keys"], "left over": info["unexpected_keys"]}
    if found := [f"{name_some(keys)} {fault}" for fault, keys in faults.items() if keys]:
        raise ModelError(f"{path}: its tensors are not those of a {type(model).__name__}: {'; '.join(found)}")
    if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ModelError(f"{path}: {name_some(broken)} hold values that are not finite numbers; get the file again")
    return model.eval(), tokenizer, header


def _require_possible(config: Any, header: Header, path: Path) -> None:
    """Refuse a model that is larger than its file, before anything is allocated for it.

    Raises:
        ModelError: the sizes in the header are not those of its tensors, or cannot be those of a model.
    """
    architecture = header.keys.get("general.architecture")
    rope = getattr(config, "rope_parameters", None) or {}
    if fault := impossible({**config.to_dict(), **rope}):
        raise ModelError(f"{path}: {fault}; get the file again")
    if head_dim := header.keys.get(f"{architecture}.attention.key_length"):  # not read for every architecture
        config.head_dim = head_dim
    if ROPE_FACTORS in header.tensors:
        config.rope_parameters = _rope_parameters(config, path)
    with torch.device("meta"):
        wanted = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(math.prod(shape) for name, shape in header.tensors.items() if name != ROPE_FACTORS)
    if wanted != held:
        raise ModelError(
            f"{path}: its keys describe {wanted:,} parameters, and its tensors have {held:,}; get the file again, or "
            "the model's Hugging Face folder"
        )


def _rope_parameters(config: Any, path: Path) -> dict[str, Any]:
    """Return the rotary settings that divide the frequencies as the file's own factors do.

    Raises:
        ModelError: no settings that config.json can hold do.
    """
    from gguf import GGUFReader, dequantize

    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
    factors: Float[Tensor, " pairs"] = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).flatten()
    plain = config.rope_parameters
    scaled = {**plain, "rope_type": "llama3", "factor": factors.max().item(), **LLAMA3_ROPE}
    config.rope_parameters = scaled
    divided, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = 2 * len(divided)
    frequencies = plain["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    if factors.shape == divided.shape and torch.allclose(frequencies / divided, factors, rtol=1e-4):
        return scaled
    raise ModelError(
        f"{path}: {ROPE_FACTORS} divides the rotary frequencies in a way that config.json has no words for; give the "
        "model's Hugging Face folder"
    )


def _narrowest(model: PreTrainedModel) -> torch.dtype:
    """Return the shortest type that holds every weight as it is."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).float(), weight) for weight in model.parameters()):
            return dtype
    return torch.float32


def _require_same_ids(tokenizer: PreTrainedTokenizerBase, folder: Path, source: Path) -> None:
    own = load_tokenizer(folder)
    for text in TEXTS:
        if own.encode(text, add_special_tokens=False) != tokenizer.encode(text, add_special_tokens=False):
            raise ModelError(f"{source}: its tokenizer is not the same when it is read back ({text!r})")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder next to `out`, and give it its name last.

    Raises:
        ConfigError: the place cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="unfinished-", dir=out.parent, ignore_cleanup_errors=True) as place:
            unfinished = Path(place, out.name)
            write(unfinished)
            unfinished.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror or error}; choose another place") from None
