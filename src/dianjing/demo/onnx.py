"""The weights in an ONNX file, read as data: no graph is run, and the package onnx is not needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dianjing.errors import ModelError

GRAPH, NODE, INITIALIZER = 7, 1, 5
"""Numbers of ONNX's fields: of the model, and of the graph in it."""
NODE_INPUT, NODE_NAME, NODE_OPERATION = 1, 3, 4
TENSOR_DIMENSIONS, TENSOR_TYPE, TENSOR_NAME, TENSOR_BYTES = 1, 2, 8, 9
FLOAT32 = 1


def read_onnx_weights(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the fp32 tensors of a file by name, and by the name of each MatMul that of the tensor it multiplies with.

    Raises:
        ModelError: the bytes are not an ONNX file.
    """
    tensors: dict[str, Tensor] = {}
    products: dict[str, str] = {}
    try:
        graph = next(value for number, value in _fields(memoryview(content)) if number == GRAPH)
        for number, value in _fields(graph):
            if number == INITIALIZER:
                tensors |= _tensor(value)
            elif number == NODE:
                node = [(number, bytes(value).decode()) for number, value in _fields(value) if number <= NODE_OPERATION]
                if (NODE_OPERATION, "MatMul") in node:
                    inputs = [text for number, text in node if number == NODE_INPUT]
                    products |= {text: inputs[1] for number, text in node if number == NODE_NAME}
    except (StopIteration, IndexError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"not a sound ONNX file ({type(error).__name__})") from None
    return tensors, products


def _tensor(message: memoryview) -> dict[str, Tensor]:
    """Return the tensor of a message under its name, nothing for one that is not in fp32."""
    shape: list[int] = []
    name, kind, data = "", 0, memoryview(b"")
    for number, value in _fields(message):
        if number == TENSOR_DIMENSIONS:
            shape += [value] if isinstance(value, int) else _numbers(value)
        elif number == TENSOR_TYPE:
            kind = value
        elif number == TENSOR_NAME:
            name = bytes(value).decode()
        elif number == TENSOR_BYTES:
            data = value
    if kind != FLOAT32 or len(data) != 4 * math.prod(shape):
        return {}
    return {name: torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(shape).copy())}


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message; its texts and messages are views of bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _varint(message, place)
        else:
            size = {1: 8, 5: 4}[kind] if kind in (1, 5) else len(message) + 1
        if place + size > len(message):
            raise ValueError("a field ends outside its message")
        yield number, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if not byte & 128:
            return value, place


def _numbers(packed: memoryview) -> list[int]:
    found, place = [], 0
    while place < len(packed):
        value, place = _varint(packed, place)
        found.append(value)
    return found
