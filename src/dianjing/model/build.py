"""A text LLM, a vision tower and a new projector -> one LLaVA, with all that reads data for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dianjing.config.schema import ProjectorKind, Recipe
from dianjing.data.encode import Encoder, image_token_id, load_tokenizer
from dianjing.data.picture_tokens import Size
from dianjing.data.template import check_template, doubts, template_for
from dianjing.errors import ModelError
from dianjing.formats.weights import weight_files
from dianjing.layers.attention import PACKED, UNREAD_MASK
from dianjing.layers.fp8 import quantize_layers_to_fp8, require_fp8
from dianjing.layers.nf4 import quantize_layers, require_bitsandbytes
from dianjing.model.folders import base_folders
from dianjing.model.language import LoadReport, count, load_language_model
from dianjing.model.projector import KINDS, picture_tokens
from dianjing.model.towers.families import load_tower, select_strategy, tower_config, tower_family
from dianjing.model.weights import load_projector
from dianjing.pictures.image import ImageProcessor
from dianjing.pictures.rule import PictureRule

PROBE = ((0, 1, 2, 3, 4), (2, 1, 0), (3, 0, 3, 2, 2))
"""Records of token ids that show whether an LLM keeps records apart; the last changes places with the first."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that can be trained or asked, and what turns records into what it reads."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    image_processor: ImageProcessor
    report: LoadReport


def build(
    recipe: Recipe, device: str | torch.device = "cpu", *, fresh_projector: bool = False, move: bool = True
) -> Built:
    """Return the model of a recipe before anything in it is frozen or adapted.

    `fresh_projector` leaves projector.init_from unread: the weights of a checkpoint follow. Without `move` the model
    stays in the CPU's memory, for a device that can only hold a shard of it.

    Raises:
        ModelError: a folder, a template or the projector's checkpoint does not fit.
        ConfigError: bitsandbytes, or a GPU with FP8 units, is needed and not there.
    """
    device = torch.device(device)
    dtype = _dtype(recipe, device)
    quantization = recipe.language_model.quantization
    if quantization == "nf4":
        require_bitsandbytes()
    elif quantization == "fp8":
        require_fp8(device, dtype)
    llm_folder, tower_folder = base_folders(recipe)
    tokenizer = load_tokenizer(llm_folder)
    template, chosen = template_for(tokenizer, recipe.language_model.template)
    check_template(template, tokenizer)
    image_processor = _before_weights(llm_folder, tower_folder, recipe)

    llm, llm_report = load_language_model(llm_folder, dtype)
    if quantization:
        (quantize_layers if quantization == "nf4" else quantize_layers_to_fp8)(llm, device)
    tower, tower_report = load_tower(tower_folder, dtype)
    _require_size(tower, image_processor, tower_folder)
    size = image_processor.size, image_processor.size
    image_id = image_token_id(tokenizer)
    _require_rows(llm, tokenizer, image_id)
    layer, kind = recipe.vision_tower.feature_layer, recipe.projector.kind
    model: Any = assemble(llm, tower, image_id, layer, recipe.seed, kind=kind, size=size)
    if move:
        model.to(device)
    prove_isolation(llm)
    source, passed_over = f"new, seed {recipe.seed}", list[str]()
    if recipe.projector.init_from and not fresh_projector:
        source = f"from {load_projector(model, recipe.projector.init_from, passed_over.append)}"
    projector = LoadReport((*passed_over, f"projector: {count(model.model.multi_modal_projector)}, {source}"))
    encoder = Encoder(
        tokenizer=tokenizer,
        template=template,
        picture_tokens=picture_tokens(model.config, size, KINDS[kind]),
        max_tokens=recipe.data.max_tokens,
        on_long_record=recipe.data.on_long_record,
        image_token_id=image_id,
    )
    return Built(
        model=model,
        tokenizer=tokenizer,
        encoder=encoder,
        image_processor=image_processor,
        report=LoadReport((*llm_report.lines, chosen, *doubts(template, tokenizer))) + tower_report + projector,
    )


def assemble(
    llm: PreTrainedModel,
    tower: PreTrainedModel,
    image_token_id: int,
    feature_layer: int,
    seed: int,
    *,
    kind: ProjectorKind = "mlp",
    size: Size | None = None,
) -> LlavaForConditionalGeneration:
    """Return a LLaVA made of the two parts themselves (no copies) and a new fp32 projector.

    `size` is that of prepared pictures; None = as the tower's configuration says.

    Raises:
        ModelError: the tower has no such layer, or the LLM cannot keep the records of a pack apart.
    """
    require_isolation(llm)
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
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": select_strategy(tower.config),
        "tie_word_embeddings": llm.config.tie_word_embeddings,
        "dtype": llm.config.dtype,
    }
    config = LlavaConfig(**settings)
    projector = KINDS[kind]
    config.image_seq_length = picture_tokens(config, size or (tower.config.image_size,) * 2, projector)()
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model = llm.get_decoder()
    model.model.vision_tower = tower
    model.lm_head = llm.get_output_embeddings()
    model.model.multi_modal_projector = projector.new(config, seed)
    model.set_attn_implementation({"text_config": PACKED, "vision_config": "sdpa"})
    return model


def require_isolation(llm: Any) -> None:
    """Refuse an LLM in which one record of a pack could see another, by what its class says."""
    last: Any = next(reversed(getattr(llm.get_decoder(), "layers", [None])), None)
    parts = all(hasattr(last, part) for part in ("self_attn", "mlp")) and hasattr(last.self_attn, "o_proj")
    if not parts or not llm._supports_attention_backend or getattr(llm, "_is_stateful", False):
        raise ModelError(
            f"{type(llm).__name__} is not supported: records share a forward pass without seeing each other, which "
            "needs an LLM whose layers mix tokens by attention only, through transformers' attention interface"
        )
    config = llm.config
    for setting in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, setting, None):
            raise ModelError(
                f"{type(llm).__name__} is not supported: it caps its logits ({setting} {getattr(config, setting):g}), "
                "which neither a LLaVA nor the attention used here does; choose another LLM"
            )


@torch.no_grad()
def prove_isolation(llm: Any) -> None:
    """Run records through the LLM, packed and alone.

    Raises:
        ModelError: a record is changed by its neighbour, or is not what the LLM makes of it by itself.
    """
    device, dtype = llm.device, llm.config.dtype
    first, second, other = (torch.tensor(ids, device=device) for ids in PROBE)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        own = llm(input_ids=second[None], use_cache=False).logits[0].float()
        hidden = llm.get_decoder()(input_ids=second[None], use_cache=False).last_hidden_state[0]
        plain = llm.get_output_embeddings()(hidden).float()
        packed = [_packed_logits(llm, [before, second])[len(before) :].float() for before in (first, other)]
    # The same shapes give the same bits, whatever the precision; a record alone has another shape than in a pack.
    rounding = 1e-3 if dtype == torch.float32 else 0.25
    for what, one, two, tolerance in (
        ("it changes what its output head computes, which a LLaVA does not do", own, plain, 1e-5),
        ("a record is changed by the one before it in a pack", *packed, 1e-5),
        ("a record in a pack is not what it is alone", packed[0], plain, rounding),
    ):
        gap = float((one - two).abs().max() / two.abs().max().clamp(min=1e-6))
        if not gap <= tolerance:
            raise ModelError(
                f"{type(llm).__name__} is not supported: {what} (logits differ by {gap:.1%}); choose another LLM"
            )


def _packed_logits(llm: Any, records: list[Tensor]) -> Float[Tensor, "tokens vocab"]:
    """Return the logits that training would see."""
    lengths = [len(record) for record in records]
    hidden = llm.get_decoder()(
        inputs_embeds=llm.get_input_embeddings()(torch.cat(records))[None],
        position_ids=torch.cat([torch.arange(length, device=llm.device) for length in lengths])[None],
        attention_mask=UNREAD_MASK,
        use_cache=False,
        cu_seqlens=torch.tensor([0, *lengths], device=llm.device).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
    ).last_hidden_state[0]
    return llm.get_output_embeddings()(hidden)


def _before_weights(llm_folder: Path, tower_folder: Path, recipe: Recipe) -> ImageProcessor:
    """Return the tower's preprocessing; what is wrong with either folder is said before the weights of one are read."""
    for folder in (llm_folder, tower_folder):
        weight_files(folder)
    family = tower_family(tower_config(tower_folder))
    return family.preprocessing(tower_folder, recipe.data.aspect, PictureRule.of(recipe.data))


def _require_size(tower: PreTrainedModel, image_processor: ImageProcessor, folder: Path) -> None:
    """Refuse preprocessing that makes pictures of another size than the tower takes."""
    if tower_family(tower.config).sized_by_config and image_processor.size != tower.config.image_size:
        raise ModelError(
            f"{folder}: the tower takes pictures of {tower.config.image_size} pixels, but "
            f"preprocessor_config.json makes them {image_processor.size}; put the tower's own file there"
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
