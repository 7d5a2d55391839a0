"""A model with adapters -> the weights it would have without them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dianjing.layers.fp8 import Fp8Linear
from dianjing.layers.nf4 import dequantized, is_nf4

ADAPTER = "default"


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the fp32 state dict of the model with every LoRA added to the weight it stands on, NF4 and FP8 undone.

    Names are those of the model before it had adapters; the model itself stays as it is. Tied weights come
    as one tensor under both names, unless an adapter on the head has untied them.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    adapted: dict[str, Any] = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
    merged: dict[str, Tensor] = {}
    same: dict[int, Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or ".weight." in name:  # below a weight stand the statistics of its four bits
            continue
        holder, _, kind = name.rpartition(".")
        if isinstance(modules[holder], Fp8Linear) and kind != "bias":
            if kind == "scale":
                continue
            name, weight = f"{holder}.weight", modules[holder].dequantized()
        owner = name.removesuffix(".base_layer.weight")
        plain = name.replace(".base_layer.", ".")
        if owner in adapted and owner != name:
            merged[plain] = _values(weight) + adapted[owner].get_delta_weight(ADAPTER).float()
        else:
            merged[plain] = same.setdefault(id(weight), _values(weight))
    return merged


def _values(weight: Tensor) -> Tensor:
    return (dequantized(weight) if is_nf4(weight) else weight.detach()).float()
