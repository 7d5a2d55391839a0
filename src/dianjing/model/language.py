"""A folder with a text LLM -> the model, its weights all accounted for; InternLM2 is read as the Llama it is."""

from __future__ import annotations

import json
import os.path
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dianjing.errors import ModelError

INTERNLM2_TO_LLAMA = {
    "model.tok_embeddings.": "model.embed_tokens.",
    "output.": "lm_head.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
}
FUSED_QKV = ".attention.wqkv."

INTERNLM2_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
)

BAD_CONFIG = (KeyError, TypeError, ValueError, ZeroDivisionError, StrictDataclassError)
"""What a configuration class raises for values that it cannot have."""

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""The first that is there is read, whole or in the shards that its index names."""


MOST_LAYERS = 1000
"""A model is built before its weights are read: what a broken number would take hours for is refused."""
AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rope_theta", "image_size", "patch_size"),
)
ACTIVATIONS = ("hidden_act", "hidden_activation")


@dataclass(frozen=True)
class LoadReport:
    """What was read from where, a line a part, to be printed."""

    lines: tuple[str, ...]

    def __add__(self, other: LoadReport) -> LoadReport:
        return LoadReport(self.lines + other.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def load_language_model(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Return the causal LM of a folder, its weights in `dtype`, and what was read; no code of the folder is run.

    Raises:
        ModelError: the folder is no causal LM that can be read, or its weights are not exactly the model's.
    """
    folder = Path(folder)
    config, model_class = _configured(folder)
    weight_files(folder)
    if config.get("model_type") == "internlm2":
        model, how = _load_internlm2(folder, config, dtype), "InternLM2, read as Llama"
    else:
        model = load_exactly(model_class, folder, dtype=dtype)
        how = type(model).__name__
    return model, LoadReport((f"language model: {how}, {count(model)} from {folder}",))


def empty_language_model(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal LM of a folder's config.json, its weights without numbers (torch's meta device).

    Raises:
        ModelError: the folder is no causal LM that can be read.
    """
    folder = Path(folder)
    config, model_class = _configured(folder)
    try:
        if config.get("model_type") == "internlm2":
            shape = _as_llama(folder, config)
        else:
            shape = model_class.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return model_class._from_config(shape, dtype=dtype)
    except (*BAD_CONFIG, OSError) as error:
        raise ModelError(f"{folder}/config.json: {' '.join(str(error).split())}; copy it again") from None


def _configured(folder: Path) -> tuple[dict[str, Any], Any]:
    """Return config.json and the class of the LLM that it describes."""
    config = read_config(folder)
    kind = str(config.get("model_type"))
    _require_text_only(folder, config)
    if kind == "internlm2":
        return config, LlamaForCausalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return config, getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    raise ModelError(
        f'{folder}: model_type "{kind}" is no text LLM that can be read; give the folder of a causal LM whose '
        "architecture transformers knows by itself (code in a model folder is never run)"
    )


def _require_text_only(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that has eyes or ears already, and one whose weights are packed into fewer bits."""
    parts = [name for name in ("text_config", "vision_config", "audio_config") if name in config]
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")), "")
    if parts or "ConditionalGeneration" in architecture:
        found = f"it has {parts[-1]}" if parts else f"transformers reads it as {architecture}"
        raise ModelError(
            f'{folder}: model_type "{config.get("model_type")}" is multimodal already ({found}); '
            "give a text-only LLM, which gets its eyes here"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise ModelError(
            f"{folder}: its weights are quantized ({method}), which loses what training needs; give the folder of the "
            "original weights"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model folder.

    Raises:
        ModelError: it is missing, is not a JSON object, or a size in it is none that a model can have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: there is no config.json; give the folder of a Hugging Face model")
    config = _read_object(path)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict) and (fault := _impossible(part)):
            raise ModelError(f"{path}: {fault}; copy it again")
    return config


def _impossible(config: Mapping[str, Any]) -> str:
    """Return what no model has, "" when nothing is wrong; values of other types are left to transformers."""
    numbers = {name: config[name] for name in AT_LEAST_ONE if isinstance(config.get(name), int | float)}
    for name, value in numbers.items():
        if value < 1:
            return f"{name} is {value}; at least 1 is needed"
    if (layers := numbers.get("num_hidden_layers", 1)) > MOST_LAYERS:
        return f"num_hidden_layers is {layers}; no model has over {MOST_LAYERS}"
    heads, groups = numbers.get("num_attention_heads", 0), numbers.get("num_key_value_heads", 1)
    if heads % groups:
        return f"num_attention_heads is {heads}, which is no multiple of num_key_value_heads, {groups}"
    for name in ACTIVATIONS:
        if isinstance(config.get(name), str) and config[name] not in ACT2FN:
            return f'{name} is "{config[name]}", which transformers does not know'
    return ""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, not a {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a folder: safetensors, and only without them pytorch_model*.bin.

    Raises:
        ModelError: there are none, or their index names files that are not there or not in the folder.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return _shards(index)
    raise ModelError(f"{folder}: it has no weights; put {' or '.join(WEIGHT_FILES)} there, or shards with their index")


def _shards(index: Path) -> list[Path]:
    weight_map = _read_object(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(f"{index}: it has no weight_map from tensors to files; copy it again")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{index}: {outside[0]!r} is no file of this folder; files elsewhere are not read")
    if missing := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise ModelError(f"{index}: {name_some(missing)} not there; copy the folder again")
    return [index.parent / name for name in names]


def load_exactly(
    model_class: Any, folder: Path, *, dtype: torch.dtype, weights: Mapping[str, Tensor] | None = None, **settings: Any
) -> PreTrainedModel:
    """Return a model from its folder, or from `weights` that were read there (then with `config`).

    Raises:
        ModelError: the weights are not exactly those that the configuration asks for, or cannot be read.
    """
    try:
        if weights is None and weight_files(folder)[0].suffix == ".bin":
            # Read here, where a pickle can do no harm, not by transformers.
            weights = dict(read_weights(folder))
            settings["config"] = model_class.config_class.from_pretrained(folder, local_files_only=True)
        source = {"pretrained_model_name_or_path": None if weights else folder, "state_dict": weights, **settings}
        model, info = model_class.from_pretrained(
            **source, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (*BAD_CONFIG, OSError, RuntimeError, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(error):  # transformers says so, beside the sizes of each tensor
            text = "the weights are of other sizes than its config.json asks for; copy the folder again"
            raise ModelError(f"{folder}: {text}") from None
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    faults = {"missing": info["missing_keys"], "left over": info["unexpected_keys"]}
    found = [f"{name_some(keys)} {fault}" for fault, keys in faults.items() if keys]
    if found:
        raise ModelError(f"{folder}: the weights are not those of its config.json: {'; '.join(found)}")
    return model


def name_some(names: Iterable[str]) -> str:
    """Return the first three names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def count(model: torch.nn.Module) -> str:
    """Return the size of a model in words, tied weights counted once."""
    return f"{sum(weight.numel() for weight in model.parameters()):,} parameters"


def make_config(config_class: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Return a configuration with these settings of a folder's config.json.

    Raises:
        ModelError: a value is none that it can have.
    """
    try:
        return config_class(**settings)
    except BAD_CONFIG as error:
        raise ModelError(f"{folder}/config.json: {' '.join(str(error).split())}; copy it again") from None


def _load_internlm2(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    llama = _as_llama(folder, config)
    weights: dict[str, Tensor] = {}
    try:
        for name, weight in read_weights(folder):
            weights |= internlm2_to_llama(name, weight, llama)
    except HeadsError as error:
        raise ModelError(f"{folder}: the weights are not those of its config.json: {error}") from None
    return load_exactly(LlamaForCausalLM, folder, dtype=dtype, weights=weights, config=llama)


def _as_llama(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return InternLM2's configuration as Llama's."""
    settings = {name: config[name] for name in INTERNLM2_SETTINGS if name in config}
    return make_config(LlamaConfig, folder, settings | {"attention_bias": bool(config.get("bias", False))})


class HeadsError(ModelError):
    """A wqkv is of an LLM with other heads."""


def internlm2_to_llama(name: str, weight: Tensor, config: Any) -> dict[str, Tensor]:
    """Return one InternLM2 tensor under Llama's names.

    wqkv holds, for each key-value head, the rows of its query heads, then of the key, then of the value:
    with 4 query and 2 key-value heads q0 q1 k0 v0 q2 q3 k1 v1.

    Raises:
        HeadsError: it cannot be divided so.
    """
    stored = name
    for old, new in INTERNLM2_TO_LLAMA.items():
        name = name.replace(old, new)
    if FUSED_QKV not in name:
        return {name: weight}
    heads = getattr(config, "num_attention_heads", 0)
    groups = getattr(config, "num_key_value_heads", None) or heads
    rows = weight.shape[0] if weight.dim() else 0
    if not rows or not groups or heads % groups or rows % (heads + 2 * groups):
        raise HeadsError(
            f"{stored} has {rows} rows, which {heads} query and {groups} key-value heads cannot share; it is of "
            "another LLM; name the one that it was trained on"
        )
    grouped = weight.unflatten(0, (groups, heads // groups + 2, -1))
    parts = {"q_proj": grouped[:, :-2], "k_proj": grouped[:, -2:-1], "v_proj": grouped[:, -1:]}
    return {
        name.replace(FUSED_QKV, f".self_attn.{part}."): rows.flatten(0, 2).contiguous() for part, rows in parts.items()
    }


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a folder's weight files.

    Raises:
        ModelError: a file is damaged, is a pickle of more than tensors, or holds what another one holds too.
    """
    holders: dict[str, str] = {}
    for path in weight_files(folder):
        for name, weight in _read_file(path):
            if name in holders:
                raise ModelError(f"{path}: {name} is in {holders[name]} too; which counts is not said; copy it again")
            holders[name] = path.name
            yield name, weight


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        yield from _unpickle(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
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
            raise ModelError(f"{path}: damaged, or no file of tensors: {error}; copy it again") from None
        raise ModelError(
            f"{path}: refused: to be read it asks for {_asked_for(path, str(error))}, and a file that asks for more "
            "than tensors may run any program. Nothing was run; get safetensors, from a source you trust"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(weight, Tensor) for weight in content.values()):
        raise ModelError(f"{path}: a table of tensors by name is needed, and something else is in it")
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
    return strange[0] if strange else "something that is no tensor"
