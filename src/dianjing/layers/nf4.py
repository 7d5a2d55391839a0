"""Frozen linear layers of the LLM's decoder in four bits (NF4).

NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3) through bitsandbytes: blocks of 64 weights, each
weight one of 16 values times the largest of its block; these largest values are held in 8 bits. XTuner computes with
the weights in fp16; here they are dequantized to the run's precision, bf16 or fp32, whose range needs no loss scaling.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dianjing.errors import ConfigError, ModelError
from dianjing.extras import install

BLOCK_SIZE = 64
"""Weights that share a scale; bitsandbytes 0.50.2 dequantizes NF4 wrongly on CPUs if a block crosses rows."""


def require_bitsandbytes() -> None:
    """Refuse to begin without the package that holds layers in four bits.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401 # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ConfigError(
            'language_model.quantization = "nf4" needs bitsandbytes, which is not installed: '
            f'{install("qlora")}; or set it to ""'
        ) from None


@torch.no_grad()
def quantize_layers(llm: PreTrainedModel, device: torch.device) -> None:
    """Move the linear layers of each decoder layer to `device` in NF4; embeddings, norms and head stay as they are.

    At any time only one layer is held in full precision too.

    Raises:
        ModelError: the rows of a layer are not a whole number of blocks.
    """
    layers: Any = llm.get_decoder().layers
    for module in [*layers.modules()]:
        for name, linear in [*module.named_children()]:
            if type(linear) is nn.Linear:
                if linear.in_features % BLOCK_SIZE:
                    raise ModelError(
                        f"{type(llm).__name__}: {name} has {linear.in_features} inputs, not a multiple of "
                        f'{BLOCK_SIZE}, and cannot be held in NF4; set language_model.quantization to ""'
                    )
                setattr(module, name, _in_nf4(linear, device))


def is_nf4(weight: Tensor) -> bool:
    """Return whether a parameter is held in NF4."""
    return getattr(weight, "quant_state", None) is not None


def dequantized(weight: Any) -> Float[Tensor, "outputs inputs"]:
    """Return a weight that is held in NF4 as the layer computes with it."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def num_parameters(weight: Any) -> int:
    """Return how many numbers a parameter has; in NF4 two share a byte."""
    return weight.quant_state.shape.numel() if is_nf4(weight) else weight.numel()


def num_bytes(weight: Any) -> int:
    """Return the bytes a parameter takes in memory, scales included."""
    if not is_nf4(weight):
        return weight.nbytes
    state = weight.quant_state
    return weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes


def _in_nf4(linear: nn.Linear, device: torch.device) -> nn.Linear:
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    dtype = linear.weight.dtype
    packed: Any = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    # From bf16, so that the four bits are the same in fp32 (on a CPU) and in bf16 (on a GPU).
    weight = linear.weight.to(device, torch.bfloat16)
    four_bits, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    make: Any = Params4bit
    packed.weight = make(four_bits, quant_state=state, quant_type="nf4", bnb_quantized=True)
    packed.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(device), requires_grad=False)
    # On CPUs with AVX512-BF16 the first forward pass in eval mode would replace the weight by a rounded copy, for good.
    packed.support_avx512bf16_for_cpu = False
    packed.requires_grad_(False)
    linear.weight = None  # pyright: ignore[reportAttributeAccessIssue] (freed before the next layer's copy is made)
    return packed
