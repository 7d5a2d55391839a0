"""easy-VQA's pictures and questions, out of its package -> LLaVA's JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile

from dianjing.constants import IMAGE_MARKER
from dianjing.errors import DataError

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
TYPES = ("colour", "shape", "yes_no")
FOLDER = "easy_vqa/data"
PARTS = {"train": "train", "held_out": "test"}
CAPTION_QUESTION = "Write a terse but informative summary of the picture."
SEED = 1

Asked = tuple[str, str]
"""Question and answer."""


@dataclass(frozen=True, kw_only=True)
class EasyVQA:
    """Where the parts lie; each is a LLaVA JSON whose pictures are relative to `images`."""

    images: Path
    captions: Path
    conversations: Path
    held_out: Path

    @classmethod
    def within(cls, folder: Path) -> EasyVQA:
        """Return the parts that lie in a folder."""
        names = ("captions", "conversations", "held_out")
        return cls(images=folder / "images", **{name: folder / f"{name}.json" for name in names})


def type_of(answer: str) -> str:
    """Return which of TYPES a question is, by its answer."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes_no"


def write_easy_vqa(package: ZipFile, folder: Path, *, yes_no: int, held_out: int) -> EasyVQA:
    """Write pictures, captions, conversations and held-out questions into a folder.

    A conversation has every colour and shape question of its picture, and as many yes/no questions as `yes_no` says.
    `held_out` questions of each type are kept.

    Raises:
        DataError: the package does not hold what easy-VQA's does.
    """
    data = EasyVQA.within(folder)
    captions, conversations, questions = [], [], []
    for picture, asked in _questions(package, "train"):
        image = _write_picture(package, folder, "train", picture)
        if caption := _caption(asked):
            captions.append(_record(f"caption-{picture}", image, [(CAPTION_QUESTION, caption)]))
        left_out = [pair for pair in asked if pair[1] in YES_NO][yes_no:]
        kept = [pair for pair in asked if pair not in left_out]
        conversations.append(_record(f"train-{picture}", image, kept))
    random.Random(SEED).shuffle(captions)
    random.Random(SEED).shuffle(conversations)
    for picture, asked in _questions(package, "held_out"):
        image = f"{PARTS['held_out']}/{picture}.png"
        for number, pair in enumerate(asked):
            record = _record(f"held-out-{picture}-{number}", image, [pair])
            questions.append({**record, "type": type_of(pair[1])})
    random.Random(SEED).shuffle(questions)
    chosen = [one for kind in TYPES for one in [q for q in questions if q["type"] == kind][:held_out]]
    random.Random(SEED).shuffle(chosen)  # so that another picture is of another kind of question too
    for picture in dict.fromkeys(PurePosixPath(one["image"]).stem for one in chosen):
        _write_picture(package, folder, "held_out", picture)
    for path, records in ((data.captions, captions), (data.conversations, conversations), (data.held_out, chosen)):
        path.write_text(json.dumps(records), encoding="utf-8")
    return data


def _questions(package: ZipFile, part: str) -> Iterator[tuple[str, Sequence[Asked]]]:
    """Yield each picture of a part with what is asked about it."""
    name = f"{FOLDER}/{PARTS[part]}/questions.json"
    of_picture: dict[str, list[Asked]] = {}
    try:
        for question, answer, picture in json.loads(package.read(name)):
            of_picture.setdefault(str(int(picture)), []).append((str(question), str(answer)))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{package.filename}: {name}: not easy-VQA's questions: {error}") from None
    yield from sorted(of_picture.items(), key=lambda pair: int(pair[0]))


def _write_picture(package: ZipFile, folder: Path, part: str, picture: str) -> str:
    """Copy a picture out of the package; return its path within the images."""
    image = f"{PARTS[part]}/{picture}.png"
    try:
        content = package.read(f"{FOLDER}/{PARTS[part]}/images/{picture}.png")
    except KeyError:
        raise DataError(f"{package.filename}: picture {image} is not in it; get the package again") from None
    path = folder / "images" / image
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return image


def _caption(asked: Sequence[Asked]) -> str:
    """Return a sentence with colour and shape, "" where the questions do not tell both."""
    colour, shape = (_known(asked, words) for words in (COLOURS, SHAPES))
    return f"A {colour} {shape}." if colour and shape else ""


def _known(asked: Sequence[Asked], words: Sequence[str]) -> str:
    """Return which of the words is true of the picture: as an answer, or in a question that says it of the picture."""
    if found := [answer for _, answer in asked if answer in words]:
        return found[0]
    for question, answer in asked:
        said = [word for word in words if word in question]
        other = answer in (*COLOURS, *SHAPES)  # "what is the blue shape?"
        affirmed = answer == "yes" and " not " not in question and "no " not in question
        if said and (other or affirmed):
            return said[0]
    return ""


def _record(name: str, image: str, asked: Sequence[Asked]) -> Mapping[str, Any]:
    turns = []
    for question, answer in asked:
        marker = "" if turns else f"{IMAGE_MARKER}\n"
        turns += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}
