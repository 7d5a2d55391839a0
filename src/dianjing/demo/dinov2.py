"""A DINOv2 backbone in an ONNX file -> the folder that transformers and Dianjing read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dianjing.demo.onnx import read_onnx_weights
from dianjing.errors import ModelError

PREFIX = "backbone."
HEAD_WIDTH = 64
"""Of every DINOv2."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_dinov2(content: bytes, folder: Path, size: int) -> None:
    """Write config.json, the weights and a preprocessing that makes pictures of `size` pixels into a new folder.

    Raises:
        ModelError: the file has no such backbone.
    """
    try:
        weights = backbone(content)
        config = _config(weights)
    except (KeyError, StopIteration) as error:
        raise ModelError(f"no DINOv2 backbone is in the ONNX file: {error} is missing") from None
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, values in (("config.json", config), ("preprocessor_config.json", _preprocessing(size))):
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def backbone(content: bytes) -> dict[str, Tensor]:
    """Return the weights under the names that DINOv2's own files have.

    An exporter keeps the names of parameters that it leaves alone, and calls what it turns round by numbers: the
    matrices, named here by the products they are in, and the two parts of the position table, known by their sizes.
    """
    tensors, products = read_onnx_weights(content)
    weights = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    for product, name in products.items():
        if name in tensors and product.startswith(f"/{PREFIX[:-1]}/"):
            inside = product.removeprefix(f"/{PREFIX[:-1]}/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{inside}.weight"] = tensors[name].T.contiguous()
    width = weights["embeddings.cls_token"].shape[-1]
    tables = [value for name, value in tensors.items() if not name.startswith(PREFIX) and value.ndim == 3]
    first = next(table for table in tables if table.shape == (1, 1, width))
    grid = next(table for table in tables if table.shape[0] == 1 and table.shape[1] > 1 and table.shape[2] == width)
    weights["embeddings.position_embeddings"] = torch.cat([first, grid], 1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # of pretraining; no picture that is seen whole needs it
    return {name: value.contiguous() for name, value in weights.items()}


def _config(weights: dict[str, Tensor]) -> dict[str, object]:
    patches = weights["embeddings.patch_embeddings.projection.weight"]
    width, patch_size = patches.shape[0], patches.shape[-1]
    layers = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
    side = math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "image_size": side * patch_size,
        "patch_size": patch_size,
    }


def _preprocessing(size: int) -> dict[str, object]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
