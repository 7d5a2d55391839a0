"""Journal -> LLaVA records, in an order that no interruption changes, with all that was dropped or failed."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dianjing.constants import IMAGE_MARKER
from dianjing.eval.score import normalise
from dianjing.make.filters import same_answer, why_dropped
from dianjing.make.journal import Journal
from dianjing.make.pictures import Picture, near_duplicates
from dianjing.make.prompts import Prompt
from dianjing.make.replies import Pair, read_pairs, read_text
from dianjing.make.requests import Parameters, Request, blind_request

RecordJson = dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """A turn that does not become part of the data, or a whole reply (`question` "" then)."""

    image: str
    prompt: str
    reason: str
    question: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Failed:
    """A request without a usable answer."""

    image: str
    prompt: str
    index: int
    reason: str


@dataclass(kw_only=True)
class Made:
    """The records that the journal gives."""

    records: list[RecordJson] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    unasked: int = 0
    """Requests that no call was made for yet."""
    blind_requests: list[Request] = field(default_factory=list)
    """The questions of the blind check; their answers are in the journal or not."""

    @property
    def drops(self) -> dict[str, int]:
        """Return how many were dropped for each reason."""
        return dict(Counter(one.reason for one in self.dropped).most_common())


def build(
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    journal: Journal,
    parameters: Parameters,
    *,
    blind: bool = False,
    problems: dict[str, str] | None = None,
) -> Made:
    """Return the records of a plan; each has the turns of all requests of one picture and prompt.

    `blind`: drop what the model answers in the same way without the picture.
    """
    made = Made()
    by_name = {prompt.name: prompt for prompt in prompts}
    grouped: dict[tuple[str, str], list[Request]] = {}
    for request in requests:
        assert request.picture, "records are about pictures"
        grouped.setdefault((request.picture.name, request.prompt), []).append(request)
    asked: dict[str, set[str]] = {}
    for (image, name), group in grouped.items():
        turns: list[Pair] = []
        for request in group:
            for pair in _pairs(request, by_name[name], image, journal, made, problems or {}):
                reason = _why_dropped(pair, request, by_name[name], asked.setdefault(image, set()))
                if not reason and blind and not by_name[name].questions:
                    reason = _blind(pair, request, journal, parameters, made)
                if reason:
                    made.dropped.append(Dropped(image, name, reason, pair.question, pair.answer))
                else:
                    turns.append(pair)
        if turns:
            made.records.append(_record(image, by_name[name], turns, parameters.model))
    return made


def _pairs(
    request: Request, prompt: Prompt, image: str, journal: Journal, made: Made, problems: dict[str, str]
) -> list[Pair]:
    """Return the questions and answers of one request's reply; what has none is noted in `made`."""
    entry = journal.entry(request.key)
    if entry.status == "ok":
        if request.reply == "pairs":
            return read_pairs(entry.reply)
        questions = prompt.questions or prompt.texts
        drawn = int(request.key[:8], 16) % len(questions) if prompt.questions else request.index
        return [Pair(questions[drawn], read_text(entry.reply))]
    if entry.status == "refused":
        made.dropped.append(Dropped(image, prompt.name, "refusal", answer=entry.reply or entry.reason))
    elif entry.status == "invalid" and not entry.settled:
        made.unasked += 1  # once more
    elif reason := problems.get(request.key, entry.reason):
        made.failed.append(Failed(image, prompt.name, request.index, reason))
    else:
        made.unasked += 1
    return []


def _why_dropped(pair: Pair, request: Request, prompt: Prompt, asked: set[str]) -> str:
    reason = why_dropped(pair.question, pair.answer, request.language)
    if reason or prompt.questions:
        return reason
    question = normalise(pair.question)
    if question in asked:
        return "same_question"
    asked.add(question)
    return ""


def _blind(pair: Pair, request: Request, journal: Journal, parameters: Parameters, made: Made) -> str:
    without = blind_request(pair.question, request.language, parameters)
    made.blind_requests.append(without)
    entry = journal.entry(without.key)
    return "blind" if entry.status == "ok" and same_answer(pair.answer, read_text(entry.reply)) else ""


def _record(image: str, prompt: Prompt, turns: Sequence[Pair], model: str) -> RecordJson:
    def messages() -> Iterator[dict[str, str]]:
        for i, turn in enumerate(turns):
            yield {"from": "human", "value": turn.question if i else f"{IMAGE_MARKER}\n{turn.question}"}
            yield {"from": "gpt", "value": turn.answer}

    return {
        "id": f"{image}#{prompt.name}",
        "image": image,
        "conversations": list(messages()),
        "type": prompt.kind,
        "language": prompt.language,
        "model": model,
        "prompt": {"name": prompt.name, "sha256": prompt.sha256},
    }


def held_out_names(pictures: Sequence[Picture], share: float, seed: int) -> set[str]:
    """Return about `share` of the pictures, near-duplicates together; the same ones whenever the pictures are.

    The order in which groups are taken is drawn from the seed; a group that is too large for what is still wanted is
    passed over.
    """
    group_of = {i: group for group in near_duplicates([one.dhash for one in pictures]) for i in group}
    groups = {group_of.get(i, (i,)) for i in range(len(pictures))}

    def drawn(group: tuple[int, ...]) -> bytes:
        return sha256(f"{seed} {min(pictures[i].sha256 for i in group)}".encode()).digest()

    wanted = round(share * len(pictures))
    taken: set[str] = set()
    for group in sorted(groups, key=drawn):
        if len(taken) + len(group) <= wanted:
            taken |= {pictures[i].name for i in group}
    return taken


def overlap(train: Sequence[RecordJson], held_out: Sequence[RecordJson], pictures: Sequence[Picture]) -> dict[str, int]:
    """Return what the two sides have in common, counted from what is written."""
    sides = [{record["image"] for record in side} for side in (train, held_out)]
    names = [picture.name for picture in pictures]
    groups = [{names[i] for i in group} for group in near_duplicates([one.dhash for one in pictures])]
    said = [{_first_turn(record) for record in side} for side in (train, held_out)]
    return {
        "pictures_in_train": len(sides[0]),
        "pictures_in_held_out": len(sides[1]),
        "pictures_on_both_sides": len(sides[0] & sides[1]),
        "near_duplicate_groups_on_both_sides": sum(bool(group & sides[0] and group & sides[1]) for group in groups),
        "first_questions_with_the_same_answer_on_both_sides": len(said[0] & said[1]),
    }


def _first_turn(record: RecordJson) -> tuple[str, str]:
    question, answer = record["conversations"][:2]
    return normalise(question["value"]), normalise(answer["value"])


def near_duplicate_names(pictures: Sequence[Picture]) -> list[list[str]]:
    """Return the groups of pictures that look nearly the same."""
    return [[pictures[i].name for i in group] for group in near_duplicates([one.dhash for one in pictures])]


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
