"""A toy family: DINOv2 under another model_type, to show what a new tower takes."""

from __future__ import annotations

from transformers import Dinov2Config

from dianjing.model.towers.dinov2 import Dinov2


class ToyConfig(Dinov2Config):
    """DINOv2's configuration under another name."""

    model_type = "toy"


class Toy(Dinov2):
    """DINOv2's model, read from folders of model_type "toy"."""

    name = "Toy"
    model_types = ("toy",)
    config_class = ToyConfig
