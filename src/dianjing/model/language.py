"""A folder with a text LLM -> the model, its weights all accounted for; InternLM2 is read as the Llama it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.internlm2 import HeadsError, internlm2_to_llama
from dianjing.formats.llava_folder import HEAD, is_llava_config, part_config, part_weights
from dianjing.formats.weights import name_some, read_weights, weight_files

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
"""The exceptions that a configuration class raises for values that it cannot have."""


@dataclass(frozen=True)
class LoadReport:
    """The files that were read, a line for each part, for printing."""

    lines: tuple[str, ...]

    def __add__(self, other: LoadReport) -> LoadReport:
        return LoadReport(self.lines + other.lines)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def load_language_model(folder: str | Path, dtype: torch.dtype) -> tuple[PreTrainedModel, LoadReport]:
    """Return the causal LM of a folder, its weights in `dtype`, and what was read; no code of the folder is run.

    Of a LLaVA in transformers' layout it is the LLM in it.

    Raises:
        ModelError: the folder is not a causal LM that can be read, or its weights are not exactly the model's.
    """
    folder = Path(folder)
    config, model_class = _configured(folder)
    weight_files(folder)
    if config.get("model_type") == "internlm2":
        model, how = _load_internlm2(folder, config, dtype), "InternLM2, read as Llama"
    elif is_llava_config(config):
        model = _load_out_of_llava(model_class, folder, config, dtype)
        how = f"{type(model).__name__} out of a LLaVA"
    else:
        model = load_exactly(model_class, folder, dtype=dtype)
        how = type(model).__name__
    return model, LoadReport((f"language model: {how}, {count(model)} from {folder}",))


def empty_language_model(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the causal LM of a folder's config.json, its weights without numbers (torch's meta device).

    Raises:
        ModelError: the folder is not a causal LM that can be read.
    """
    folder = Path(folder)
    config, model_class = _configured(folder)
    try:
        if config.get("model_type") == "internlm2":
            shape = _as_llama(folder, config)
        elif is_llava_config(config):
            shape = make_config(model_class.config_class, folder, part_config(folder, config, "text_config"))
        else:
            shape = model_class.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return model_class._from_config(shape, dtype=dtype)
    except (*BAD_CONFIG, OSError) as error:
        raise ModelError(f"{folder}/config.json: {' '.join(str(error).split())}; copy it again") from None


def _configured(folder: Path) -> tuple[dict[str, Any], Any]:
    """Return config.json and the class of the LLM that it describes."""
    config = read_config(folder)
    text = part_config(folder, config, "text_config") if is_llava_config(config) else config
    kind = str(text.get("model_type"))
    _require_text_only(folder, text)
    if kind == "internlm2":
        return config, LlamaForCausalLM
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return config, getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    raise ModelError(
        f'{folder}: model_type "{kind}" is not a text LLM that can be read; give the folder of a causal LM whose '
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
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and "mrope" in (scaling.get("type"), scaling.get("rope_type")):
        raise ModelError(f"{folder}: the text part of a model that sees (rope type mrope); give a text-only LLM")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        raise ModelError(
            f"{folder}: its weights are quantized ({method}), which loses what training needs; give the folder of the "
            "original weights"
        )


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
        if "ignore_mismatched_sizes" in str(error):  # transformers says so, with the sizes of each tensor
            text = "the weights are of other sizes than its config.json asks for; copy the folder again"
            raise ModelError(f"{folder}: {text}") from None
        raise ModelError(f"{folder}: cannot be loaded: {error}") from error
    faults = {"missing": info["missing_keys"], "left over": info["unexpected_keys"]}
    found = [f"{name_some(keys)} {fault}" for fault, keys in faults.items() if keys]
    if found:
        raise ModelError(f"{folder}: the weights are not those of its config.json: {'; '.join(found)}")
    return model


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


def _load_out_of_llava(
    model_class: Any, folder: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    weights = part_weights(folder, "language_model")
    settings = part_config(folder, config, "text_config") | {"tie_word_embeddings": HEAD not in weights}
    shape = make_config(model_class.config_class, folder, settings)
    return load_exactly(model_class, folder, dtype=dtype, weights=weights, config=shape)


def _as_llama(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return InternLM2's configuration as Llama's."""
    settings = {name: config[name] for name in INTERNLM2_SETTINGS if name in config}
    return make_config(LlamaConfig, folder, settings | {"attention_bias": bool(config.get("bias", False))})
