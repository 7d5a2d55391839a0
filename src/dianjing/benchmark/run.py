"""A model and a benchmark's questions -> answers, with what they are worth with and without sight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dianjing.benchmark.item import Benchmark, Item, Judged, mean
from dianjing.data.record import with_markers
from dianjing.errors import DataError
from dianjing.eval.sight import digests, other_pictures
from dianjing.eval.summary import NO_PICTURE, OTHER_PICTURE, RIGHT, WAYS, Figure, interval
from dianjing.infer.answers import answer_questions, check_pictures
from dianjing.infer.generate import LoadedModel
from dianjing.infer.pictures import PictureFiles
from dianjing.infer.questions import Question
from dianjing.journal import JournalFile

ENDINGS = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The worth of a model's answers to one benchmark, by way of asking."""

    questions: int
    judged: Mapping[str, Judged]
    """By the ways of `eval`: right picture, another one, none."""
    sight: Figure | None
    """The main figure with the right picture minus the same with another, over questions that have both."""

    @property
    def blind(self) -> bool:
        """True if the score without a picture is not below that with the right one: it says nothing about seeing.

        Where nothing is right in any way there is no score to compare.
        """
        if NO_PICTURE not in self.judged or not any(unit.value for one in self.judged.values() for unit in one.units):
            return False
        gain = [a.value - b.value for a, b in zip(self.judged[RIGHT].units, self.judged[NO_PICTURE].units, strict=True)]
        return interval(gain)[0] <= 0

    def figure(self, way: str, type_: str | None = None) -> Figure | None:
        """Return the mean with its interval, of all units or of those of one type; None where nothing was asked so."""
        if way not in self.judged:
            return None
        values = [unit.value for unit in self.judged[way].units if type_ in (None, unit.type)]
        return Figure(mean(values), *interval(values)) if values else None

    @property
    def types(self) -> list[str]:
        """The types of questions, in order of first appearance."""
        return list(dict.fromkeys(unit.type for unit in self.judged[RIGHT].units)) if RIGHT in self.judged else []

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        ways = {WAYS[way]: judged.figures for way, judged in self.judged.items()}
        main = {WAYS[way]: self.figure(way) for way in self.judged}
        by_type = {name: {WAYS[way]: self.figure(way, name) for way in self.judged} for name in self.types}
        return {
            "questions": self.questions,
            "figures": ways,
            "main": main,
            "sight": self.sight,
            "by_type": by_type,
            "a blind model passes": self.blind,
        }


def questions_of_items(items: Sequence[Item], folder: Path) -> list[Question]:
    """Return the items as questions; pictures that the benchmark's file holds are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Question(
            id=item.id,
            turn=0,
            type=item.type,
            text=with_markers(item.text, len(item.pictures)),
            images=tuple(_name(picture, folder) for picture in item.pictures),
            reference="",
        )
        for item in items
    ]


def _name(picture: str | bytes, folder: Path) -> str:
    if isinstance(picture, str):
        return picture
    ending = next((ending for start, ending in ENDINGS.items() if picture.startswith(start)), ".jpg")
    file = folder / (hashlib.sha256(picture).hexdigest()[:24] + ending)
    if not file.is_file():
        file.write_bytes(picture)
    return file.name


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A benchmark's questions, and where their pictures and answers are."""

    benchmark: Benchmark
    items: Sequence[Item]
    questions: Sequence[Question]
    image_root: str
    journal: Path | None
    """Answers are kept here and not asked for again."""
    header: Mapping[str, str]
    """The things that the journal stands on: the benchmark, its file, the model."""


def score_benchmark(
    loaded: LoadedModel, asked: Asked, advance: Callable[[int], object] = lambda count: None
) -> tuple[Scores, list[str]]:
    """Return the scores, and the answers with the right pictures.

    Raises:
        DataError: a picture cannot be used, or the journal is of something else.
    """
    check_pictures(asked.questions, asked.image_root, loaded.picture_rule)
    digest_of = digests((name for one in asked.questions for name in one.images), asked.image_root)
    others = other_pictures(asked.questions, digest_of)
    ways: dict[str, list[Question | None]] = {RIGHT: [*asked.questions]}
    if loaded.can_see:
        ways[OTHER_PICTURE] = [
            replace(one, images=images) if images else None for one, images in zip(asked.questions, others, strict=True)
        ]
        ways[NO_PICTURE] = [
            replace(one, text=item.text, images=()) for one, item in zip(asked.questions, asked.items, strict=True)
        ]
    with ExitStack() as closing:
        answers = _Answers(loaded, asked, advance, closing)
        said = {way: answers.of(way, questions) for way, questions in ways.items()}
    right = [str(answer) for answer in said[RIGHT]]
    scored = [i for i, item in enumerate(asked.items) if asked.benchmark.has_reference(item)]
    judged = {
        way: asked.benchmark.judge([asked.items[i] for i in scored], [str(said[way][i]) for i in scored])
        for way in said
        if scored and all(said[way][i] is not None for i in scored)
    }
    sight = None
    if OTHER_PICTURE in judged:
        pairs = zip(judged[RIGHT].units, judged[OTHER_PICTURE].units, strict=True)
        gain = [a.value - b.value for a, b in pairs]
        sight = Figure(mean(gain), *interval(gain))
    return Scores(questions=len(asked.items), judged=judged, sight=sight), right


class _Answers:
    """Asks each question once; what a journal has is not asked again."""

    def __init__(self, loaded: LoadedModel, asked: Asked, advance: Callable[[int], object], closing: ExitStack) -> None:
        self._loaded, self._asked, self._advance = loaded, asked, advance
        self._known: dict[tuple[str, str], str] = {}
        self._files = PictureFiles(loaded)
        self._journal: JournalFile | None = None
        if asked.journal is not None:
            self._journal = JournalFile(asked.journal, asked.header, "give another --out")
            self._journal.open(self._take)
            closing.callback(self._journal.close)

    def _take(self, line: dict[str, Any]) -> None:
        self._known[str(line["way"]), str(line["id"])] = str(line["answer"])

    def of(self, way: str, questions: Sequence[Question | None]) -> list[str | None]:
        """Return an answer for each question; None where it cannot be asked so."""
        wanted = [one for one in questions if one is not None and (way, one.id) not in self._known]
        self._advance(sum(one is not None for one in questions) - len(wanted))

        def answered(one: Question, answer: str) -> None:
            self._known[way, one.id] = answer
            if self._journal is not None:
                self._journal.append({"way": way, "id": one.id, "answer": answer})
            self._advance(1)

        limit = self._asked.benchmark.max_new_tokens
        answer_questions(self._loaded, wanted, self._asked.image_root, limit, answered, self._files)
        return [self._known[way, one.id] if one is not None else None for one in questions]


def require_distinct(items: Sequence[Item], file: str) -> None:
    """Refuse questions that share their number: their answers could not be told apart.

    Raises:
        DataError: two do.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"{file}: two questions have the number {item.id!r}; give each its own, or remove one")
        seen.add(item.id)


def write_results(folder: Path, asked: Asked, scores: Scores, answers: Sequence[str]) -> list[Path]:
    """Write scores.json, predictions.jsonl and the file that a test server takes; return their paths."""
    written = {"scores.json": json.dumps(scores.to_json(), ensure_ascii=False, indent=1) + "\n"}
    lines = [
        json.dumps({"id": item.id, "type": item.type, "prompt": item.text, "answer": answer}, ensure_ascii=False)
        for item, answer in zip(asked.items, answers, strict=True)
    ]
    written["predictions.jsonl"] = "\n".join(lines) + "\n"
    if asked.benchmark.submission:
        name, text = asked.benchmark.submission
        written[f"submit-{name}"] = text(asked.items, answers)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]
