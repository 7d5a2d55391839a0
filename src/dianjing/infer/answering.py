"""A model as it is asked: its parts, and the state it computes answers in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dianjing.model.forward import arithmetic


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Compute without gradients or dropout, in the precision the model was built for; leave all as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode(), arithmetic(cast(Any, model)):
            yield
    finally:
        if training:
            model.train()


def language_parts(model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
    """Return the decoder without its head, and the head, of a LLaVA or of a text-only LLM."""
    llava = isinstance(model, LlavaForConditionalGeneration)
    decoder: Any = model.model.language_model if llava else model.get_decoder()
    head: Any = model.get_output_embeddings()
    return decoder, head
