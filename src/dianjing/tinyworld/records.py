"""Write the demo's data set: pictures as PNG files and records in LLaVA's JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dianjing.constants import IMAGE_MARKER
from dianjing.tinyworld.grammar import (
    LANGUAGES,
    QUESTION_TYPES,
    Question,
    ask,
    ask_several,
    caption_question,
)
from dianjing.tinyworld.render import render
from dianjing.tinyworld.scene import Scene, sample_distinct
from dianjing.tinyworld.wording import describe

Turns = Callable[[random.Random, Scene, int], list[Question]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many scenes each part of the data set has."""

    pretrain: int = 4000
    finetune: int = 4000
    questions_per_scene: int = 8
    held_out: int = 360
    held_out_pairs: int = 180
    captions: int = 60


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where the parts lie; every path is a LLaVA JSON whose pictures are relative to `images`."""

    images: Path
    pretrain: Path
    finetune: Path
    held_out: Path
    held_out_pairs: Path
    held_out_captions: Path
    held_out_in_words: Path
    scenes: dict[str, Scene]
    """Record id -> scene, of the held-out captions."""


def _caption_turn(rng: random.Random, scene: Scene, index: int) -> list[Question]:
    return [caption_question(rng, scene, LANGUAGES[index % 2])]


def _conversation(number: int) -> Turns:
    """Several questions in one language; every fourth conversation also asks for the caption."""

    def turns(rng: random.Random, scene: Scene, index: int) -> list[Question]:
        language = LANGUAGES[index % 2]
        questions = ask_several(rng, scene, language, number)
        if index % 4 < 2:
            questions.insert(rng.randint(0, len(questions)), caption_question(rng, scene, language))
        return questions

    return turns


def _one_question(rng: random.Random, scene: Scene, index: int) -> list[Question]:
    """One question; types and languages take turns, so that each type is asked equally often."""
    language = LANGUAGES[index // len(QUESTION_TYPES) % 2]
    question = ask(rng, scene, language, QUESTION_TYPES[index % len(QUESTION_TYPES)])
    return [question] if question else ask_several(rng, scene, language, 1)


def _record(name: str, index: int, turns: Iterable[Question], *, picture: bool) -> dict:
    turns = list(turns)
    conversations = []
    for k, turn in enumerate(turns):
        marker = f"{IMAGE_MARKER}\n" if picture and k == 0 else ""
        conversations.append({"from": "human", "value": marker + turn.text})
        conversations.append({"from": "gpt", "value": turn.answer})
    record = {
        "id": f"{name}-{index:05d}",
        "conversations": conversations,
        "types": [turn.type for turn in turns],
    }
    return {**record, "image": f"{name}/{index:05d}.png"} if picture else record


def _write(folder: Path, name: str, scenes: list[Scene], turns: Turns, seed: int) -> Path:
    rng = random.Random(seed)
    pictures = folder / "images" / name
    pictures.mkdir(parents=True, exist_ok=True)
    records = []
    for index, scene in enumerate(scenes):
        render(scene, rng.getrandbits(32)).save(pictures / f"{index:05d}.png", compress_level=1)
        records.append(_record(name, index, turns(rng, scene, index), picture=True))
    return _save(folder / f"{name}.json", records)


def _save(path: Path, records: list[dict]) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def _in_words(folder: Path, scenes: list[Scene], seed: int) -> Path:
    """Write the held-out questions with the scene told in words instead of shown: the ceiling of any eyes."""
    rng = random.Random(seed)
    forms = ("sentence", "sentences", "places")
    records = []
    for index, scene in enumerate(scenes):
        turns = _one_question(rng, scene, index)
        description = describe(rng, scene, LANGUAGES[index % 2], forms[index % 3])
        turns = [Question(turn.type, f"{description}\n{turn.text}", turn.answer) for turn in turns]
        records.append(_record("held_out_in_words", index, turns, picture=False))
    return _save(folder / "held_out_in_words.json", records)


def write_demo_data(folder: Path, sizes: Sizes, seed: int = 7) -> DemoData:
    """Draw every scene of the demo.

    No held-out scene is in the training data, and no held-out pair in any of its pictures.
    """
    rng = random.Random(seed)
    held_out = sample_distinct(rng, sizes.held_out, "train")
    captions = sample_distinct(rng, sizes.captions, "train", without=set(held_out))
    train = sample_distinct(rng, sizes.pretrain + sizes.finetune, "train", without={*held_out, *captions})
    pairs = sample_distinct(rng, sizes.held_out_pairs, "held_out")
    return DemoData(
        images=folder / "images",
        pretrain=_write(folder, "pretrain", train[: sizes.pretrain], _caption_turn, seed + 1),
        finetune=_write(
            folder, "finetune", train[sizes.pretrain :], _conversation(sizes.questions_per_scene), seed + 2
        ),
        held_out=_write(folder, "held_out", held_out, _one_question, seed + 3),
        held_out_pairs=_write(folder, "held_out_pairs", pairs, _one_question, seed + 4),
        held_out_captions=_write(folder, "held_out_captions", captions, _caption_turn, seed + 5),
        held_out_in_words=_in_words(folder, held_out, seed + 3),
        scenes={f"held_out_captions-{index:05d}": scene for index, scene in enumerate(captions)},
    )
