"""Seer -> a folder that AutoModelForImageTextToText and AutoProcessor of transformers 4.57 and 5.x read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from dianjing.constants import IMAGE_MARKER
from dianjing.data.image import ImageProcessor
from dianjing.errors import ExportError
from dianjing.export.chat_template import jinja
from dianjing.export.layout import EMBEDDING, HEAD, hub_config, hub_state
from dianjing.export.merge import merged_state
from dianjing.export.tokenizer import save_tokenizer
from dianjing.use.generate import Seer, stop_sequences
from dianjing.use.load import TEMPLATE_KEY

SHARD_SIZE = "5GB"


def save_hf(seer: Seer, folder: Path) -> None:
    """Write weights (merged, fp32), configuration, tokenizer and processor into an existing folder.

    Raises:
        ExportError: the model has no eyes, or its tokenizer cannot be written.
    """
    model, tokenizer, encoder = seer.model, seer.tokenizer, seer.encoder
    if not isinstance(model, LlavaForConditionalGeneration) or seer.image_processor is None:
        raise ExportError(f"{seer.name} is a text-only model; train it first, then export the run")
    text_config, vision_config = cast(Any, model.config.text_config), cast(Any, model.config.vision_config)
    stand_in: Any = next((i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None), 0)
    weights = hub_state(merged_state(model), encoder.image_token_id, stand_in)
    _save_weights(weights, folder)

    chat_template = jinja(encoder.template, str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""))
    max_length = text_config.max_position_embeddings
    save_tokenizer(tokenizer, encoder.image_token_id, chat_template, max_length, folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    config = hub_config(
        model.config,
        vocab_size=weights[EMBEDDING].shape[0],
        tied=HEAD not in weights,
        image_token_id=encoder.image_token_id,
    )
    _write_json(folder / "config.json", config | {TEMPLATE_KEY: encoder.template.name})
    _write_json(folder / "generation_config.json", _generation_config(seer))
    _write_json(folder / "preprocessor_config.json", preprocessor_config(seer.image_processor))
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_MARKER,
            "patch_size": vision_config.patch_size,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        },
    )


def preprocessor_config(processor: ImageProcessor) -> dict[str, Any]:
    """Return preprocessor_config.json of the image processor that pads to a square where training did."""
    size = processor.size
    return {
        "image_processor_type": "LlavaImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_pad": processor.aspect == "pad",
        "do_resize": True,
        "size": {"shortest_edge": size} if processor.crop else {"height": size, "width": size},
        "resample": processor.resample,
        "do_center_crop": processor.crop,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": processor.rescale,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
        "do_convert_rgb": True,
    }


def _generation_config(seer: Seer) -> dict[str, Any]:
    tokenizer = seer.tokenizer
    values = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(stop[0] for stop in stop_sequences(seer) if len(stop) == 1),
        "pad_token_id": next(
            (i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if i is not None),
            None,
        ),
    }
    return {name: value for name, value in values.items() if value is not None}


def _save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
