"""A few fixed records, whose loss is measured now and then with their pictures, with others and with none.

The sight gap is the loss with another record's pictures minus the loss with the right ones. It stays near 0 in a run
that learns only the texts, as when pictures are shuffled against the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dianjing.config.load import stop_after
from dianjing.config.schema import DataConfig, Recipe
from dianjing.data.collate import Batch
from dianjing.data.dataset import Dataset
from dianjing.data.pack import pack
from dianjing.data.record import Record, load_records, without_markers
from dianjing.data.survey import image_folder
from dianjing.errors import DataError
from dianjing.model.compile import uncompiled

RECORDS = 16
ENOUGH = 8
"""Records, or pictures, that are not all the same by chance."""
FORWARD = 0.4
"""Cost of a forward pass, as a share of a training step on the same records: 0.37 and 0.34 in the tiny world."""
MOST_TIME = 0.01
"""Share of a run's time that its probes may take."""
TRAIN, HELD_OUT = "train", "held_out"
RIGHT, OTHER, NONE = "right", "other", "none"

Losses = Mapping[str, float]
"""RIGHT, OTHER (absent if all records show the same picture) and NONE (absent without pictures) -> loss per token."""


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """The packs of some records, by RIGHT, OTHER and NONE."""

    packs: Mapping[str, Sequence[Batch]]

    @torch.no_grad()
    def losses(self, loss_of: Callable[[Batch], torch.Tensor], device: torch.device) -> dict[str, float]:
        """Return the loss per supervised token with each kind of pictures."""
        return {
            kind: sum(float(loss_of(batch.to(device))) for batch in packs) / sum(pack.num_supervised for pack in packs)
            for kind, packs in self.packs.items()
        }


class Probes:
    """The probe sets of a run: some of its training records, and held-out ones if the recipe names them."""

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        total_steps: int,
        history: Iterable[Mapping[str, Any]],
        warn: Callable[[str], object],
    ) -> None:
        """Read the records and their pictures; `history` is what was measured before a resume.

        `warn` gets a line when pictures or answers are all the same.

        Raises:
            DataError: held-out records or their pictures cannot be used, or are in the training data too.
        """
        self.every = recipe.train.probe_every
        if self.every < 0:
            self.every = steps_between(recipe.train.global_batch_size, 2 if recipe.data.held_out else 1)
        self._total_steps = total_steps
        self._save_every = recipe.train.save_every
        self._patience = stop_after(recipe.train.stop_when)
        self.history: list[Mapping[str, Any]] = [*history]
        self._sets: dict[str, ProbeSet] = {}
        if not self.every:
            return
        seeing = [index for index, pictures in enumerate(dataset.pictures) if pictures]
        if seeing:
            records = [dataset.records[index] for index in _spread(seeing)]
            self._sets[TRAIN] = probe_set(records, dataset)
            for line in _doubts(records, self._sets[TRAIN]):
                warn(line)
        if recipe.data.held_out:
            self._sets[HELD_OUT] = _held_out(recipe.data, dataset)

    def due(self, step: int) -> bool:
        """Return whether the losses are measured after a step."""
        saved = HELD_OUT in self._sets and step % self._save_every == 0
        return bool(self._sets) and (step % self.every == 0 or step == self._total_steps or saved)

    def measure(
        self, step: int, model: nn.Module, loss_of: Callable[[Batch], torch.Tensor], device: torch.device
    ) -> dict[str, Any]:
        """Return the losses of each set after a step, as train.jsonl has them; training is not changed by it."""
        model.eval()
        with uncompiled(model):
            found = {name: one.losses(loss_of, device) for name, one in self._sets.items()}
        model.train()
        self.history.append({"step": step, **found})
        return {"step": step, **found}

    def held_out_loss(self, step: int) -> float | None:
        """Return the held-out loss after a step, None if it was not measured then."""
        measured = (found[HELD_OUT][RIGHT] for found in self.history if found["step"] == step and HELD_OUT in found)
        return next(measured, None)

    def worn_out(self, step: int) -> bool:
        """Return whether train.stop_when ends the run after a step."""
        seen = [(found[HELD_OUT][RIGHT], found["step"]) for found in self.history if HELD_OUT in found]
        return bool(self._patience and seen) and step - min(seen)[1] >= self._patience


def steps_between(global_batch_size: int, sets: int) -> int:
    """Return the optimizer steps between two probes, which then take at most MOST_TIME of a run."""
    return max(1, round(3 * sets * RECORDS * FORWARD / MOST_TIME / global_batch_size))


def sight_gap(losses: Losses) -> float | None:
    """Return how much the loss rises with another record's pictures; None if there are no other pictures."""
    return losses[OTHER] - losses[RIGHT] if OTHER in losses and RIGHT in losses else None


def probes_of(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what is measured in lines of train.jsonl; what cannot have been written by a probe is left out."""
    written = (row["probe"] for row in rows if isinstance(row.get("probe"), list))
    return [found for several in written for found in several if _is_probe(found)]


def _is_probe(found: Any) -> bool:
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return False
    sets = [losses for name, losses in found.items() if name in (TRAIN, HELD_OUT)]
    return all(
        isinstance(losses, dict) and RIGHT in losses and all(type(loss) is float for loss in losses.values())
        for losses in sets
    )


def verdict(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on what a run has learned, by its first and last probe."""
    lines: list[str] = []
    for name in (TRAIN, HELD_OUT):
        seen = [(found["step"], found[name]) for found in history if name in found]
        if not seen:
            continue
        (begin, first), (end, last) = seen[0], seen[-1]
        words = f"{name.replace('_', '-')} probe: loss {first[RIGHT]:.3f} at step {begin:,}"
        words += f", {last[RIGHT]:.3f} at step {end:,}"
        gap = sight_gap(last)
        lines.append(words if gap is None else f"{words}; {gap:+.3f} with other pictures: near 0, they are not used")
    best = min(((found[HELD_OUT][RIGHT], found["step"]) for found in history if HELD_OUT in found), default=None)
    if best:
        lines.append(f"the held-out loss was lowest after step {best[1]:,} ({best[0]:.4f})")
    return lines


def probe_set(records: Sequence[Record], dataset: Dataset) -> ProbeSet:
    """Return the packs of some records."""
    others = _other_pictures(records)
    kinds = {
        RIGHT: records,
        OTHER: [replace(record, images=images) for record, images in zip(records, others, strict=True)],
        NONE: [_without_pictures(record) for record in records],
    }
    if others == [record.images for record in records]:
        del kinds[OTHER]
    if not any(record.images for record in records):
        del kinds[NONE]
    return ProbeSet(packs={kind: [*_packs(found, dataset)] for kind, found in kinds.items()})


def _doubts(records: Sequence[Record], probe: ProbeSet) -> Iterator[str]:
    """Yield what is odd about the pictures and answers of some records."""
    answers = {turn.answer for record in records for turn in record.turns}
    if len(records) >= ENOUGH and len(answers) == 1:
        yield f'{len(records)} of {len(records)} records looked at have the same answer, "{answers.pop():.40}"'
    names = {(record.source, name) for record in records for name in record.images}
    pictures = torch.cat([batch.pixels for batch in probe.packs[RIGHT]])
    if len(names) >= ENOUGH and bool((pictures == pictures[:1]).all()):
        yield f"{len(names)} pictures of different names are one and the same; `dianjing check` says more"


def _packs(records: Sequence[Record], dataset: Dataset) -> Iterator[Batch]:
    lengths = [len(dataset.encoder.encode(record).input_ids) for record in records]
    for members in pack(lengths, max(dataset.config.pack_tokens, *lengths)):
        yield dataset.batch_of([records[number] for number in members])


def _other_pictures(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Return for each record the pictures of the next one that has as many, and others; else its own."""
    found: list[tuple[str, ...]] = []
    for number, record in enumerate(records):
        ring = [*records[number + 1 :], *records[:number]]
        fits = (one.images for one in ring if len(one.images) == len(record.images) and one.source == record.source)
        found.append(next((images for images in fits if not {*images} & {*record.images}), record.images))
    return found


def _without_pictures(record: Record) -> Record:
    turns = tuple(replace(turn, question=without_markers(turn.question)) for turn in record.turns)
    return replace(record, images=(), turns=turns)


def _spread(numbers: Sequence[int]) -> list[int]:
    """Return at most RECORDS of some numbers, evenly spread."""
    count = min(RECORDS, len(numbers))
    return [numbers[place * len(numbers) // count] for place in range(count)]


def _held_out(config: DataConfig, dataset: Dataset) -> ProbeSet:
    records = load_records(config.held_out).records
    chosen = [records[number] for number in _spread(range(len(records)))]
    _require_apart(chosen, dataset)
    return probe_set(chosen, dataset)


def _require_apart(held_out: Sequence[Record], dataset: Dataset) -> None:
    """Refuse held-out records that are trained on.

    Raises:
        DataError: the first of them is named.
    """
    wanted = {(record.turns, _paths(record, dataset.config)): record for record in held_out}
    measures = {(len(dataset.encoder.tokens(record)[0]), len(record.images)) for record in held_out}
    alike = zip(map(abs, dataset.modality_lengths), dataset.pictures, strict=True)
    for record in (dataset.records[number] for number, measure in enumerate(alike) if measure in measures):
        if same := wanted.get((record.turns, _paths(record, dataset.config))):
            raise DataError(
                f"{same.where}: it is in the training data too, as {record.where}, so its loss says nothing about new "
                "pictures; remove one of the two (`dianjing check --held-out` names all)"
            )


def _paths(record: Record, config: DataConfig) -> tuple[str, ...]:
    return tuple(f"{image_folder(config, record.source)}/{name}" for name in record.images)
