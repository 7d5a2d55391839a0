"""The state in which a model computes answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from dianjing.model.forward import arithmetic


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Compute without gradients or dropout, in the precision the model was built for; leave all as it was."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad(), arithmetic(cast(Any, model)):
            yield
    finally:
        if training:
            model.train()
