"""Keys and tensors <-> a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dianjing.errors import ExportError
from dianjing.extras import install

try:
    import gguf
    from gguf import GGMLQuantizationType as Type
except ImportError:
    raise ExportError(f"GGUF needs the package gguf: {install('gguf')}") from None

Value = bool | int | float | str | list[Any]
"""Of a key: integers are written as uint32, lists as their first element says."""

BLOCK_TYPES = {name.lower(): Type[name] for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")}
TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, **BLOCK_TYPES}
"""Types that the gguf package can write by itself."""
K_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Mixtures that only llama.cpp can make."""

ROUNDING = {
    **{Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 4e-3},
    **{Type.Q8_0: 0.01, Type.Q6_K: 0.03, Type.Q5_0: 0.06, Type.Q5_1: 0.06, Type.Q5_K: 0.06},
    **{Type.Q4_0: 0.15, Type.Q4_1: 0.15, Type.Q4_K: 0.15, Type.Q3_K: 0.3, Type.Q2_K: 0.6},
}
"""Largest error of a tensor that a type explains: root mean square, relative to the tensor's own."""


def stored_type(tensor: Tensor, wanted: Type) -> Type:
    """Return the type a tensor is written in: vectors in F32, rows that do not fill whole blocks in F16."""
    if tensor.ndim == 1:
        return Type.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else Type.F16


def write_gguf(
    path: Path, keys: Mapping[str, Value], tensors: Mapping[str, Tensor], type_of: Callable[[str, Tensor], Type]
) -> None:
    """Write a file, one tensor in memory at a time; `keys` holds general.architecture."""
    writer = gguf.GGUFWriter(path, str(keys["general.architecture"]))
    add: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    types = {name: type_of(name, tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), types[name])
    with closing(writer), np.errstate(over="ignore"):  # a number too large is seen when the file is read back
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(gguf.quantize(tensor.detach().contiguous().float().cpu().numpy(), types[name]))


def read_keys(path: Path) -> dict[str, Any]:
    """Return the keys of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_types(path: Path) -> dict[str, Type]:
    """Return the type of each tensor of a file."""
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a file in fp32, those whose names begin with `prefix`."""
    found = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith(prefix)]
    return {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in found}


def rounding(read: Tensor, written: Tensor) -> float:
    """Return the root mean square of the difference, relative to what was written; infinite for another shape."""
    if read.shape != written.shape:
        return float("inf")
    error = (read.double() - written.double()).square().mean().sqrt()
    size = written.double().square().mean().sqrt()
    return 0.0 if not error else (error / size).item()
