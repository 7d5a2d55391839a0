"""The questions that the rest of the code asks about a family of vision towers; each family has a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dianjing.data.picture_tokens import Size
from dianjing.pictures.image import Aspect, ImageProcessor
from dianjing.pictures.rule import PictureRule

Layouts = frozenset[str]
"""Names of export formats; "adapter" holds every tower and is not among them."""


class Tower(Protocol):
    """A family of towers. Its methods take transformers' model or configuration; a family that differs replaces them.

    The hidden states of a picture are its extra tokens, then its patches row by row.
    """

    name: ClassVar[str]
    """For messages."""
    model_types: ClassVar[tuple[str, ...]]
    """As config.json names the tower itself, then a whole model with the tower in it."""
    config_class: ClassVar[type[PreTrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    model_settings: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the model class in addition to its configuration."""
    layers_name: ClassVar[str]
    """Of the list of layers, within the model."""
    unused: ClassVar[tuple[str, ...]]
    """How the names of parameters begin that no feature of a patch depends on."""
    not_needed: ClassVar[tuple[str, ...]] = ()
    """How the names of tensors begin that stand next to a tower in its file and are not read."""
    prefixes: ClassVar[tuple[str, ...]] = ()
    """The prefix of a tower's names in some files."""
    sized_by_config: ClassVar[bool] = True
    """True if pictures have config.json's image_size; else the preprocessing says how large they are."""

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the configuration class is given of a folder's config.json."""
        return dict(config)

    def weights(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's tensors, by its own names, of those that a folder holds."""
        named = {self._own_name(name): weight for name, weight in read.items()}
        return {name: weight for name, weight in named.items() if not name.startswith(self.not_needed)}

    def preprocessing(
        self, folder: Path, aspect: Aspect | None = None, rule: PictureRule | None = None
    ) -> ImageProcessor:
        """Return the image processor of a folder.

        Raises:
            ModelError: the folder has none that fits the family.
        """
        return ImageProcessor.from_folder(folder, aspect, rule)

    def extra_tokens(self, config: Any) -> int:
        """Return how many states come before the patches: class and register tokens."""
        return 0

    def grid(self, config: Any, size: Size) -> tuple[int, int]:
        """Return the rows and columns of patches of a prepared picture; what is left at its edges is not seen."""
        return size[0] // config.patch_size, size[1] // config.patch_size

    def mlp_width(self, config: Any) -> int:
        """Return the inner width of a layer's MLP, as if it had two matrices."""
        return config.intermediate_size

    def layouts(self, config: Any) -> Layouts:
        """Return the export formats that can hold such a tower."""
        return frozenset()

    def hub_name(self, name: str) -> str:
        """Return a weight's name in a LLaVA of the hub, behind "vision_tower."."""
        return f"vision_model.{name}"

    def layers(self, tower: nn.Module) -> Any:
        """Return the tower's layers, a ModuleList."""
        return tower.get_submodule(self.layers_name)

    def states(
        self,
        tower: Any,
        pixel_values: Float[Tensor, "images 3 height width"],
        depth: int,
        fused: Sequence[Any] | None = None,
    ) -> Float[Tensor, "images states width"]:
        """Return the hidden states of pictures after `depth` layers; `fused` are those, as `fuse` returned them."""
        hidden = tower.embeddings(pixel_values)
        for layer in self.layers(tower)[:depth]:
            hidden = layer(hidden)
        return hidden

    def fuse(self, layers: Sequence[nn.Module]) -> Sequence[Any] | None:
        """Return layers as they compute faster on a GPU; None: they are compiled instead."""
        return None

    def can_fuse(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether `fuse` would return something."""
        return False

    def _own_name(self, name: str) -> str:
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name
