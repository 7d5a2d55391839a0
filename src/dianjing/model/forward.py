"""Batch -> summed loss over its supervised tokens: the only caller of the model in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dianjing.constants import IGNORE_INDEX
from dianjing.data.collate import Batch
from dianjing.layers.attention import UNREAD_MASK
from dianjing.layers.cross_entropy import summed_cross_entropy
from dianjing.layers.fused.decoder import CachedTokens, States, pack_layout, total
from dianjing.layers.padded import PaddedLayout, padded_layout
from dianjing.model.towers.families import layers_of, left_out, tower_family

ROWS = "rows_wanted"
"""Attribute of the last decoder layer that says which rows matter."""
CUDA_GRAPHS = "cuda_graphs"
"""Attribute of a tower with its CUDA graphs (layers/cuda_graphs.py)."""
FUSED = "fused_layers"
"""Attribute of a decoder, and of a tower, with their fused layers (layers/fused); absent where they are not fused."""


ROUND = 64
"""For fused layers, tokens of a pack and rows with a target are padded to a multiple of this: a GPU's libraries search
for the best GEMM for each new size, and memory is best reused in pieces of one size."""


def forward_loss(model: LlavaForConditionalGeneration, batch: Batch) -> Float[Tensor, ""]:
    """Return the cross-entropy of the batch's targets, summed, in fp32."""
    with arithmetic(model):
        features = image_features(model, batch.pixel_values)
        # Here, not at the loss: ranks that share weights go through them in one order, pictures or not.
        unseen = None if batch.num_images else _unseen_picture(model, batch)
    with _arithmetic_of(model, model.model.language_model.layers):
        embeddings = embed(model, batch.input_ids, batch.image_positions, features)
        shape = batch.padded_shape
        padded = padded_layout(batch.cu_seqlens, batch.position_ids, shape) if shape else None
        if unseen is not None:
            embeddings = embeddings + unseen.to(embeddings.dtype)
        logits = model.lm_head(_decoded(model, embeddings, batch, padded))  # (supervised and spare, vocab)
    spare = len(logits) - len(batch.targets)
    return summed_cross_entropy(logits, pad(batch.targets, (0, spare), value=IGNORE_INDEX))


def _decoded(
    model: LlavaForConditionalGeneration,
    embeddings: Float[Tensor, "tokens hidden"],
    batch: Batch,
    padded: PaddedLayout | None,
) -> Float[Tensor, "supervised_and_spare hidden"]:
    """Return what the decoder makes of a pack at the rows that have a target, and behind them at rows that do not."""
    decoder: Any = model.model.language_model
    layers = getattr(decoder, FUSED, None)
    if layers is None:
        with _last_layer_at(model, batch.target_rows, batch.position_ids):
            hidden = decoder(
                inputs_embeds=embeddings[None],
                position_ids=batch.position_ids[None],
                attention_mask=UNREAD_MASK,
                use_cache=False,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.max_seqlen,
                padded=padded,
            ).last_hidden_state[0]  # (tokens, hidden)
        return hidden[batch.target_rows]
    return fused_states(
        decoder, embeddings, batch.position_ids, batch.target_rows, (batch.cu_seqlens, batch.max_seqlen, padded)
    )


def fused_states(
    decoder: Any,
    embeddings: Float[Tensor, "tokens hidden"],
    position_ids: Int[Tensor, " tokens"],
    rows: Int[Tensor, " rows"],
    pack: tuple[Int32[Tensor, " documents_and_one"], int, PaddedLayout | None],
    cached: CachedTokens | None = None,
) -> Float[Tensor, "rows_and_spare hidden"]:
    """Return what a decoder with fused layers makes of a pack at `rows`, and behind them rows that mean nothing.

    `pack` is cu_seqlens, max_seqlen and the padded layout.
    """
    layers = getattr(decoder, FUSED)
    spare = -len(embeddings) % ROUND
    hidden, position_ids = pad(embeddings, (0, 0, 0, spare)), pad(position_ids, (0, spare))
    cos, sin = (part[0] for part in decoder.rotary_emb(hidden[None], position_ids=position_ids[None]))
    cu_seqlens, max_seqlen, padded = pack
    padded = padded if all(layer.can_pad(max_seqlen) for layer in layers) else None
    layout = pack_layout(cu_seqlens, max_seqlen, padded, spare)
    states: States = hidden, None
    for layer in layers[:-1]:
        states = layer(states, cos, sin, layout, cached=cached)
    # No other row is read after the last layer's attention.
    rows = pad(rows, (0, -len(rows) % ROUND), value=-1)
    return decoder.norm(total(layers[-1](states, cos, sin, layout, rows, cached)))


def language_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the decoder without its head, and the head, of a LLaVA or of a text-only LLM."""
    llava = isinstance(model, LlavaForConditionalGeneration)
    decoder: Any = model.model.language_model if llava else model.get_decoder()
    head: Any = model.get_output_embeddings()
    return decoder, head


def arithmetic(model: PreTrainedModel) -> torch.autocast:
    """Return the context in which the model computes in the precision it was built for."""
    dtype: Any = model.config.dtype
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32)


def _arithmetic_of(model: PreTrainedModel, layers: Any) -> torch.autocast:
    """Return the context for layers of the model: those held in its precision need no casts but their own."""
    held_in = next(layers[0].parameters()).dtype
    dtype: Any = model.config.dtype
    return torch.autocast(model.device.type, dtype=dtype, enabled=held_in == torch.float32 != dtype)


def image_features(
    model: LlavaForConditionalGeneration, pixel_values: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images patches hidden"]:
    """Return the projected features of pictures, run through no more of the tower's layers than they need."""
    tower: Any = model.model.vision_tower
    config: Any = model.config
    if not len(pixel_values):
        return pixel_values.new_zeros(0, 1, config.text_config.hidden_size)
    learns = torch.is_grad_enabled() and any(weight.requires_grad for weight in tower.parameters())
    with torch.set_grad_enabled(learns), _arithmetic_of(model, layers_of(tower)):
        graphs = getattr(tower, CUDA_GRAPHS, None) if learns else None
        hidden = (graphs or partial(tower_states, model))(pixel_values.to(config.dtype))
    hidden = hidden[:, left_out(config.vision_config, config.vision_feature_select_strategy) :]
    return model.model.multi_modal_projector(hidden)


def tower_states(
    model: LlavaForConditionalGeneration, pixel_values: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images states width"]:
    """Return what the tower makes of pictures, extra tokens included, after the last of its layers that matter."""
    tower: Any = model.model.vision_tower
    fused = getattr(tower, FUSED, None)
    return tower_family(tower.config).states(tower, pixel_values, num_tower_layers(model), fused)


def num_tower_layers(model: LlavaForConditionalGeneration) -> int:
    """Return how many layers of the vision tower the features have passed; the others reach no loss."""
    # hidden_states[0] is what enters the first layer.
    config: Any = model.config
    return range(config.vision_config.num_hidden_layers + 1)[config.vision_feature_layer]


def embed(
    model: LlavaForConditionalGeneration,
    input_ids: Int[Tensor, " tokens"],
    image_positions: Int[Tensor, " image_tokens"],
    features: Float[Tensor, "images patches hidden"],
) -> Float[Tensor, "tokens hidden"]:
    """Return the embeddings of the tokens, those at image_positions being the features, in their order."""
    # The id that marks a picture lies outside the vocabulary; any row will do, it is overwritten.
    embeddings = model.get_input_embeddings()(input_ids.index_fill(0, image_positions, 0))
    rows = features.flatten(0, 1).to(embeddings.dtype)
    assert len(rows) == len(image_positions), f"{len(image_positions)} image tokens, but {len(rows)} features"
    return embeddings.index_copy(0, image_positions, rows)


@contextmanager
def _last_layer_at(
    model: LlavaForConditionalGeneration, rows: Int[Tensor, " rows"], tokens: Int[Tensor, " tokens"]
) -> Iterator[None]:
    """Let the last decoder layer compute, after its attention, only these rows; no other row is read after it."""
    layer: Any = model.model.language_model.layers[-1]
    if not hasattr(layer, ROWS):
        setattr(layer, ROWS, _Rows(layer))
    wanted: _Rows = getattr(layer, ROWS)
    wanted.rows, wanted.tokens = rows, tokens
    try:
        yield
    finally:
        wanted.rows = wanted.tokens = None


class _Rows:
    """The rows that a layer is to compute after its attention, and the hooks that see to it; None: all rows.

    The hooks stay: compiled code has them in it.
    """

    def __init__(self, layer: Any) -> None:
        self.rows: Tensor | None = None
        self.tokens: Tensor | None = None
        """Any tensor with an entry a token: compiled code reads sizes off tensors."""
        for module in (layer.self_attn.o_proj, layer.mlp):
            module.register_forward_pre_hook(self._select)
            module.register_forward_hook(self._spread)

    def _select(self, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.rows is None else (inputs[0][:, self.rows],)

    def _spread(self, _module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.rows is None or self.tokens is None:
            return None
        return output.new_zeros(1, len(self.tokens), output.shape[-1]).index_copy(1, self.rows, output)


def _unseen_picture(model: LlavaForConditionalGeneration, batch: Batch) -> Float[Tensor, ""]:
    """Return a zero that depends on all that learns from pictures: each rank must have a gradient for it."""
    if not torch.is_grad_enabled():
        return torch.zeros((), device=batch.pixels.device)
    with arithmetic(model):
        features = image_features(model, batch.pixel_table.new_zeros(1, *batch.pixels.shape[1:]))
    return features.float().sum() * 0
