"""A text LLM, a vision tower and a new projector -> one LLaVA, with all that reads data for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dianjing.config.schema import Recipe
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.image import ImageProcessor
from dianjing.data.template import check_template, choose_template, get_template
from dianjing.errors import ModelError
from dianjing.model.attention import PACKED
from dianjing.model.fp8 import quantize_layers_to_fp8, require_fp8
from dianjing.model.frozen import quantize_layers, require_bitsandbytes
from dianjing.model.language import LoadReport, count, load_language_model
from dianjing.model.vision import load_vision_tower
from dianjing.model.weights import load_projector
from dianjing.tinyworld.folders import resolve

SELECT = "default"
"""CLIP's first feature is the class token, which is left out."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that can be trained or asked, and what turns records into what it reads."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    image_processor: ImageProcessor
    report: LoadReport


def build(recipe: Recipe, device: str | torch.device = "cpu", *, fresh_projector: bool = False) -> Built:
    """Return the model of a recipe before anything in it is frozen or adapted.

    `fresh_projector` leaves projector.init_from unread: the weights of a checkpoint follow.

    Raises:
        ModelError: a folder, a template or the projector's checkpoint does not fit.
        ConfigError: bitsandbytes, or a GPU with FP8 units, is needed and not there.
    """
    device = torch.device(device)
    dtype = _dtype(recipe, device)
    frozen = recipe.language_model.frozen
    if frozen == "nf4":
        require_bitsandbytes()
    elif frozen == "fp8":
        require_fp8(device, dtype)
    llm_folder = resolve(recipe.language_model.folder, "language_model")
    tower_folder = resolve(recipe.vision_tower.folder, "vision_tower")
    tokenizer = load_tokenizer(llm_folder)
    template = get_template(recipe.language_model.template or choose_template(tokenizer))
    check_template(template, tokenizer)
    image_processor = ImageProcessor.from_folder(tower_folder, recipe.data.aspect)

    llm, llm_report = load_language_model(llm_folder, dtype)
    if frozen:
        (quantize_layers if frozen == "nf4" else quantize_layers_to_fp8)(llm, device)
    tower, tower_report = load_vision_tower(tower_folder, dtype)
    image_id = image_token_id(tokenizer)
    _require_rows(llm, tokenizer, image_id)
    model: Any = assemble(llm, tower, image_id, recipe.vision_tower.feature_layer, recipe.seed)
    model.to(device)
    if image_processor.size != tower.config.image_size:
        raise ModelError(
            f"{tower_folder}: the tower takes pictures of {tower.config.image_size} pixels, but "
            f"preprocessor_config.json makes them {image_processor.size}; put the tower's own file there"
        )
    source = f"new, seed {recipe.seed}"
    if recipe.projector.init_from and not fresh_projector:
        source = f"from {load_projector(model, recipe.projector.init_from)}"
    projector = LoadReport((f"projector: {count(model.model.multi_modal_projector)}, {source}",))
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template,
        num_image_tokens=num_image_tokens(tower.config, SELECT),
        max_tokens=recipe.data.max_tokens,
        on_long_record=recipe.data.on_long_record,
        image_token_id=image_id,
    )
    return Built(
        model=model,
        tokenizer=tokenizer,
        encoder=encoder,
        image_processor=image_processor,
        report=llm_report + tower_report + projector,
    )


def num_image_tokens(vision_config: Any, strategy: str) -> int:
    """Return how many features one picture has; "default" leaves the class token out."""
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return patches if strategy == "default" else patches + 1


def assemble(
    llm: PreTrainedModel, tower: PreTrainedModel, image_token_id: int, feature_layer: int, seed: int
) -> LlavaForConditionalGeneration:
    """Return a LLaVA made of the two parts themselves (no copies) and a new fp32 projector.

    Raises:
        ModelError: the tower has no such layer, or the LLM cannot keep the records of a pack apart.
    """
    _require_isolation(llm)
    depth = tower.config.num_hidden_layers
    if not -depth - 1 <= feature_layer <= depth:
        raise ModelError(
            f"vision_tower.feature_layer is {feature_layer}, but the tower has {depth} layers: "
            f"{-depth - 1} to {depth}, -2 being LLaVA's choice"
        )
    settings: dict[str, Any] = {
        "vision_config": tower.config,
        "text_config": llm.config,
        "image_token_id": image_token_id,
        "image_seq_length": num_image_tokens(tower.config, SELECT),
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": SELECT,
        "tie_word_embeddings": llm.config.tie_word_embeddings,
        "dtype": llm.config.dtype,
    }
    config = LlavaConfig(**settings)
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model = llm.get_decoder()
    model.model.vision_tower = tower
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = new_projector(config, seed)
    model.set_attn_implementation({"text_config": PACKED, "vision_config": "sdpa"})
    return model


def new_projector(config: LlavaConfig, seed: int) -> nn.Module:
    """Return a projector with torch's own initial weights for linear layers, as LLaVA's and XTuner's have them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaMultiModalProjector(config)


def _require_isolation(llm: Any) -> None:
    """Refuse an LLM in which one record of a pack could see another."""
    if not llm._supports_attention_backend or getattr(llm, "_is_stateful", False):
        raise ModelError(
            f"{type(llm).__name__} is not supported: records share a forward pass without seeing each other, which "
            "needs an LLM whose layers mix tokens by attention only, through transformers' attention interface"
        )


def _require_rows(llm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, image_id: int) -> None:
    """Refuse a tokenizer with ids that the LLM has no embedding for; the id of a picture needs none."""
    largest = max(token for token in tokenizer.get_vocab().values() if token != image_id)
    if largest >= llm.config.vocab_size:
        raise ModelError(
            f"the tokenizer's ids go up to {largest}, but the LLM has {llm.config.vocab_size} embeddings; "
            "the folder's tokenizer is another LLM's, or has tokens that this LLM was never resized for"
        )


def _dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32
