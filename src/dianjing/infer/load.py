"""A run, an exported folder or a text-only LLM -> LoadedModel."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.constants import TEMPLATE_KEY
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import FixedCount, PictureTokens
from dianjing.data.template import template_for
from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.infer.generate import LoadedModel
from dianjing.layers.attention import PACKED
from dianjing.model.adapter import PARTS, is_adapter, load_adapter, require_bases
from dianjing.model.build import build, require_isolation
from dianjing.model.compile import fuse_layers
from dianjing.model.folders import TINYWORLD, base_folders, resolve
from dianjing.model.hub import is_hub_name
from dianjing.model.language import load_exactly, load_language_model
from dianjing.model.projector import KINDS, picture_tokens
from dianjing.model.stage import apply_stage
from dianjing.model.towers.families import family_named
from dianjing.model.weights import load_trainable_state
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.rule import PLAIN, PictureRule
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.fingerprints import changed_inputs, fingerprints
from dianjing.run.layout import RECIPE, TRAINABLE, is_run


def load_for_use(path: str, device: str | None = None) -> LoadedModel:
    """Return the model at `path`, ready to answer; `device` None = the GPU if there is one.

    `path` is a run (recipe.toml and checkpoints; its adapters stay adapters), an exported adapter or LLaVA folder or a
    LLaVA in the layout of the hub's, or the folder of a text-only LLM ("tinyworld" too), which has no eyes; the last
    two may be names of the hub (owner/name).

    Raises:
        ModelError: the folder is none of these.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if path != TINYWORLD and not Path(path).expanduser().is_dir() and not is_hub_name(path):
        raise ModelError(
            f"{path}: no such folder; give a run, an exported model, a text LLM, a model of the hub (owner/name), "
            f'or "{TINYWORLD}"'
        )
    folder = resolve(path, "language_model")
    if is_run(folder):
        loaded = _load_run(folder, device)
    elif not (folder / "config.json").is_file():
        raise ModelError(
            f"{path}: neither {RECIPE} (a run) nor config.json (a model) is in it; "
            "give the folder of a run, of an export, or of a text LLM"
        )
    elif read_config(folder).get("model_type") == "llava":
        loaded = _load_llava(folder, device)
    else:
        loaded = _load_text(folder, device)
    if loaded.model.dtype == torch.bfloat16 and loaded.model.device.type == "cuda":
        fuse_layers(loaded.model)
    return replace(loaded, name=path)


def picture_rule(path: str) -> PictureRule:
    """Return how the model at `path` reads the files of pictures; nothing is loaded."""
    folder = Path(path).expanduser()
    if is_run(folder):
        return PictureRule.of(load_recipe(folder / RECIPE).data)
    try:
        return ImageProcessor.from_folder(folder).rule
    except ModelError:  # without eyes, or one that is not there, which is said when it is loaded
        return PLAIN


def _load_run(run: Path, device: str) -> LoadedModel:
    recipe = load_recipe(run / RECIPE)
    if device == "cpu":
        recipe = replace(recipe, train=replace(recipe.train, precision="fp32"))
    _require_bases(recipe, run)
    checkpoint = None if is_adapter(run) else newest(run)
    if checkpoint:
        _say_changed_bases(recipe, checkpoint)
    built = build(recipe, device, fresh_projector=True)
    apply_stage(built.model, recipe)
    if checkpoint is None:
        load_adapter(built.model, run)
    else:
        load_trainable_state(built.model, load_file(checkpoint / TRAINABLE))
    return LoadedModel(
        name=str(run),
        model=built.model.eval(),
        tokenizer=built.tokenizer,
        encoder=built.encoder,
        image_processor=built.image_processor,
        recipe=recipe,
    )


def _require_bases(recipe: Recipe, run: Path) -> None:
    """Refuse a run whose base models are not where its recipe says, or an adapter on other bases than its own."""
    for part in PARTS:
        try:
            resolve(getattr(recipe, part).folder, part)
        except ModelError as error:
            raise ModelError(
                f"{run}: its {part.replace('_', ' ')} is not there any more ({error}); put it back, or write where it "
                f"is now to {part}.folder in {run / RECIPE}"
            ) from None
    if is_adapter(run):
        require_bases(recipe, run)


def _say_changed_bases(recipe: Recipe, checkpoint: Path) -> None:
    """Print which base models are not those that a run was trained on."""
    for subject in changed_inputs(
        read_state(checkpoint).fingerprints, fingerprints(*base_folders(recipe), None)
    ).values():
        print(
            f"warning: {checkpoint}: not what the run was trained on: {subject}; its answers will be others",
            file=sys.stderr,
        )


def _load_llava(folder: Path, device: str) -> LoadedModel:
    config = read_config(folder)
    family_named(str(config.get("vision_config", {}).get("model_type")), f"{folder} (its vision tower)")
    if not isinstance(config.get("vision_feature_layer", -2), int):
        raise ModelError(f"{folder}: it joins the features of several layers; LLaVAs of one layer can be asked here")
    tokenizer, image_processor = load_tokenizer(folder), ImageProcessor.from_folder(folder)
    model: Any = load_exactly(LlavaForConditionalGeneration, folder, dtype=_dtype(device))
    counts = picture_tokens(model.config, (image_processor.size, image_processor.size), KINDS["mlp"])
    model.config.image_seq_length = counts()
    model.set_attn_implementation({"text_config": PACKED, "vision_config": "sdpa"})
    encoder = _encoder(tokenizer, config.get(TEMPLATE_KEY), counts, model.config.image_token_id)
    ends = model.generation_config.eos_token_id
    return LoadedModel(
        name=str(folder),
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        encoder=encoder,
        stop_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        image_processor=image_processor,
    )


def _load_text(folder: Path, device: str) -> LoadedModel:
    tokenizer = load_tokenizer(folder)
    model: Any = load_language_model(folder, _dtype(device))[0]
    require_isolation(model)
    model.set_attn_implementation(PACKED)
    return LoadedModel(
        name=str(folder),
        model=model.to(device).eval().requires_grad_(False),
        tokenizer=tokenizer,
        encoder=_encoder(tokenizer, None, FixedCount(1), image_token_id(tokenizer)),
        image_processor=None,
    )


def _encoder(
    tokenizer: PreTrainedTokenizerBase, template: str | None, picture_tokens: PictureTokens, image_id: int
) -> Encoder:
    return Encoder(
        tokenizer=tokenizer,
        template=template_for(tokenizer, template or "")[0],
        picture_tokens=picture_tokens,
        max_tokens=tokenizer.model_max_length,
        on_long_record="error",
        image_token_id=image_id,
    )


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
