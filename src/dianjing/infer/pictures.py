"""Pictures as an LLM gets them: their features, each picture read and run through the tower once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, UInt8
from PIL.Image import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from dianjing.infer.answering import answering
from dianjing.model.forward import image_features
from dianjing.pictures.image import ImageProcessor, load_image, pixel_values
from dianjing.pictures.threads import on_all_cores, one_thread_a_core

AT_A_TIME = 64
"""Pictures that go through the tower together."""
OF_FREE_MEMORY = 0.1
"""Share of a GPU's free memory for features that are kept."""
ON_CPU = 2**30
"""Bytes for them on a CPU."""


@dataclass(frozen=True, eq=False)
class SeenPicture:
    """A picture that has been through the tower."""

    height: int
    """Of the picture itself, in pixels, as `width`."""
    width: int
    features: Float[Tensor, "tokens hidden"]


class _Read(NamedTuple):
    """A picture as the tower takes it, not normalised."""

    height: int
    width: int
    pixels: UInt8[Tensor, "3 height width"]


def look(model: PreTrainedModel, processor: ImageProcessor, images: Sequence[Image | SeenPicture]) -> list[SeenPicture]:
    """Return pictures with their features; one that stands in several places is looked at once."""
    new = {id(image): image for image in images if not isinstance(image, SeenPicture)}
    read = on_all_cores(lambda image: _Read(image.height, image.width, processor.pixels(image)), new.values())
    seen = dict(zip(new, _look(model, processor, read), strict=True))
    return [image if isinstance(image, SeenPicture) else seen[id(image)] for image in images]


def _look(model: PreTrainedModel, processor: ImageProcessor, read: Iterable[_Read]) -> list[SeenPicture]:
    """Return pictures with their features; a GPU works on some while the next ones are read."""
    assert isinstance(model, LlavaForConditionalGeneration), "only a LLaVA sees"
    table = processor.table().to(model.device)
    pictures = iter(read)
    seen: list[SeenPicture] = []
    while part := list(islice(pictures, AT_A_TIME)):
        pixels = torch.stack([picture.pixels for picture in part]).to(model.device)
        with answering(model):
            features = image_features(model, pixel_values(pixels, table))
        # Copies, so that a picture that is kept does not keep its neighbours.
        seen += [SeenPicture(one.height, one.width, own.clone()) for one, own in zip(part, features, strict=True)]
    return seen


class SeeingModel(Protocol):
    """A model that is shown pictures: a LoadedModel."""

    @property
    def model(self) -> PreTrainedModel:
        """Tower, projector and LLM."""
        ...

    @property
    def processor(self) -> ImageProcessor:
        """Makes pixels of pictures."""
        ...


class PictureFiles:
    """Picture files by folder and name, each read and looked at once while there is room to keep its features."""

    def __init__(self, loaded: SeeingModel) -> None:
        self._loaded = loaded
        self._kept: dict[tuple[str, str], SeenPicture] = {}
        self._room: int | None = None
        """Bytes that are left for features; None before the first."""
        self._reading: dict[tuple[str, str], Future[_Read]] = {}
        self._threads = one_thread_a_core()

    def read_ahead(self, root: str, names: Iterable[str]) -> None:
        """Begin to read pictures that will be asked for."""
        for key in dict.fromkeys((root, name) for name in names):
            if key not in self._kept and key not in self._reading:
                self._reading[key] = self._threads.submit(self._read, *key)

    def look(self, root: str, names: Iterable[str]) -> dict[str, SeenPicture]:
        """Return the pictures of a folder by name.

        Raises:
            PictureError: one cannot be read.
        """
        wanted = dict.fromkeys(names)
        self.read_ahead(root, wanted)
        new = [name for name in wanted if (root, name) not in self._kept]
        if self._room is None:
            self._room = _room_for_features(self._loaded.model.device)
        read = (self._reading.pop((root, name)).result() for name in new)
        found = dict(zip(new, _look(self._loaded.model, self._loaded.processor, read), strict=True))
        for name, picture in found.items():
            self._room -= picture.features.nbytes
            if self._room >= 0:
                self._kept[root, name] = picture
        return {name: found[name] if name in found else self._kept[root, name] for name in wanted}

    def _read(self, root: str, name: str) -> _Read:
        image = load_image(root, name, self._loaded.processor.rule)
        return _Read(image.height, image.width, self._loaded.processor.pixels(image))


def _room_for_features(device: torch.device) -> int:
    return int(OF_FREE_MEMORY * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else ON_CPU
