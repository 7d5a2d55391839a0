"""A test on the tiny world: records alone and packed, a training step, an export that answers as the run does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dianjing.config.load import load_recipe
from dianjing.config.schema import Recipe
from dianjing.data.dataset import open_dataset
from dianjing.doctor.doctor import Finding
from dianjing.errors import DianjingError, TrainError
from dianjing.export.export import export
from dianjing.infer.load import load_for_use
from dianjing.model.build import build
from dianjing.model.forward import forward_loss
from dianjing.tinyworld.records import Sizes, write_demo_data
from dianjing.train.loop import train

SIZES = Sizes(pretrain=4, finetune=1, questions_per_scene=1, held_out=1, held_out_pairs=1, captions=1)
ROUNDING = 1e-4
"""Relative difference that another order of sums may make, in fp32."""


def self_test() -> Iterator[Finding]:
    """Yield a finding for each part, the seconds it took included; the first that fails is the last."""
    with TemporaryDirectory(prefix="dianjing-doctor-") as place:
        recipe = _recipe(Path(place))
        parts: tuple[tuple[str, Callable[[Recipe], str]], ...] = (
            ("packed == one by one", _packed),
            ("a training step", _step),
            ("export == run", _export),
        )
        for name, part in parts:
            began = time.perf_counter()
            try:
                words = part(recipe)
            except DianjingError as error:
                yield Finding(subject=name, state="wrong", words=str(error))
                return
            yield Finding(subject=name, state="well", words=f"{words} ({time.perf_counter() - began:.1f} s)")


def _recipe(place: Path) -> Recipe:
    data = write_demo_data(place / "data", SIZES)
    recipe = load_recipe(
        "tinyworld_pretrain",
        {
            "output": str(place / "run"),
            "data.path": str(data.pretrain),
            "data.images": str(data.images),
            "train.global_batch_size": 4,
            "train.max_steps": 1,
            "train.precision": "fp32",
            "train.sample_every": 0,
            "train.compile": "off",
        },
    )
    return recipe


def _packed(recipe: Recipe) -> str:
    built = build(recipe)
    dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
    numbers = range(dataset.num_records)
    with torch.no_grad():
        together = float(forward_loss(built.model, dataset.batch(numbers)))
        alone = sum(float(forward_loss(built.model, dataset.batch([number]))) for number in numbers)
    difference = abs(together - alone) / alone
    if not difference <= ROUNDING:
        raise TrainError(f"the loss of {len(numbers)} records is {together:g} in a pack, {alone:g} one by one")
    return f"the losses differ by {difference:.0e} of their size"


def _step(recipe: Recipe) -> str:
    train(recipe, quiet=True)
    return f"taken on {'a GPU' if torch.cuda.is_available() else 'the CPU'}"


def _export(recipe: Recipe) -> str:
    folder = Path(recipe.output)
    export(load_for_use(str(folder), "cpu"), folder.with_name("export"))
    return "same ids, pixels, logits and answers"
