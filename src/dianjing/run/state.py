"""Progress of a run, with the inputs that must not change before it is resumed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any

from dianjing.config.fields import recipe_fields
from dianjing.config.load import RENAMED, flatten
from dianjing.config.schema import Recipe
from dianjing.config.steps import steps_per_epoch, total_steps
from dianjing.data.dataset import Dataset
from dianjing.errors import CheckpointError
from dianjing.run.fingerprints import SUBJECTS, changed_inputs

FREE_TO_CHANGE = frozenset(
    {
        "output",
        "data.path",
        "data.images",
        "data.held_out",
        "data.workers",
        "data.pack_tokens",
        "train.compile",
        "train.engine",
        "train.gradient_checkpointing",
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.probe_every",
        "train.stop_when",
        "train.sample_every",
        "train.sample_path",
        "train.sample_count",
    }
)
"""Fields that say how and where, not what is learned; the content of data.path is compared by its fingerprint."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """How far a run has come; order of the data, learning rate and dropout all follow from it."""

    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs completed."""
    samples_seen: int
    """Records trained on, repeats counted."""
    total_steps: int
    """Steps at which the run ends."""
    recipe: dict[str, Any]
    """All fields that matter, by dotted name."""
    data: dict[str, Any]
    """Counts of the data set, and its fingerprint."""
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])
    """Of SUBJECTS, and of the projector before the first step; none in checkpoints of older versions."""
    held_out_loss: float | None = None
    """Of the recipe's held-out records after this step; None if it was not measured."""
    allowed_changes: tuple[str, ...] = ()
    """Changes of the inputs that --allow-changed let pass, in the order of time."""

    def to_json(self) -> str:
        """Return the state as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @staticmethod
    def from_json(text: str) -> TrainState:
        """Return the state that `to_json` wrote."""
        fields = json.loads(text)
        fields["recipe"] = {RENAMED.get(name, name): value for name, value in fields["recipe"].items()}
        fields["allowed_changes"] = tuple(fields.get("allowed_changes", ()))
        return TrainState(**fields)


def state_at(
    step: int,
    recipe: Recipe,
    dataset: Dataset | None,
    fingerprints: Mapping[str, str] | None = None,
    allowed_changes: Sequence[str] = (),
) -> TrainState:
    """Return the state of a run after `step` optimizer steps; without a data set it cannot be resumed."""
    matters = {name: value for name, value in flatten(recipe).items() if name not in FREE_TO_CHANGE}
    matters = json.loads(json.dumps(matters))  # tuples become lists, as in a state that was read
    found = dict(fingerprints or {})
    if dataset is None:
        return TrainState(
            step=step,
            epoch=0,
            samples_seen=0,
            total_steps=step,
            recipe=matters,
            data={"fingerprint": ""},
            fingerprints=found,
        )
    in_epoch = steps_per_epoch(dataset.num_records, recipe.train.global_batch_size)
    epoch, steps = divmod(step, in_epoch)
    return TrainState(
        step=step,
        epoch=epoch,
        samples_seen=epoch * dataset.num_records + steps * recipe.train.global_batch_size,
        total_steps=total_steps(recipe, dataset.num_records),
        recipe=matters,
        data={**dataset.report, "fingerprint": dataset.fingerprint},
        fingerprints=found,
        allowed_changes=tuple(allowed_changes),
    )


DATA = "data"
ALLOWABLE = (DATA, *SUBJECTS)
"""Names that --allow-changed takes when a run is resumed; the number of records cannot change."""


def require_same_run(
    saved: TrainState, now: TrainState, checkpoint: object, allowed: Collection[str] = ()
) -> tuple[str, ...]:
    """Refuse to go on with another recipe, other data or other base models than before.

    Return the changes that were `allowed` by one of ALLOWABLE.

    Raises:
        CheckpointError: all that changed is named.
    """
    if not saved.data["fingerprint"]:
        raise CheckpointError(f"{checkpoint}: it was imported without its data; import it again with --data FILE")
    # A field that a later version added had its default in this run.
    defaults = {name: one.default for name, one in recipe_fields().items() if one.default is not MISSING}
    added = {name: defaults[name] for name in now.recipe.keys() - saved.recipe.keys() if name in defaults}
    changed = [*_changes({**saved.recipe, **added}, now.recipe)]
    inputs: dict[str, list[str]] = {}
    if saved.data["fingerprint"] != now.data["fingerprint"]:
        saved_counts, counts = ({**state.data, "fingerprint": None} for state in (saved, now))
        inputs[DATA] = [f"the data: {change}" for change in _changes(saved_counts, counts)] or [
            "the data: texts, answers, pictures or their order"
        ]
        if saved.data.get("records") != now.data.get("records"):
            changed += inputs.pop(DATA)
    inputs |= {name: [subject] for name, subject in changed_inputs(saved.fingerprints, now.fingerprints).items()}
    refused = [name for name in inputs if name not in allowed]
    changed += [change for name in refused for change in inputs[name]]
    if changed:
        way_out = f"; or, if it is meant, give {' '.join(f'--allow-changed {name}' for name in refused)}"
        way_out = way_out if refused else ""
        head = f"{checkpoint}: it is of another run; undo this, or start a new run{way_out}:"
        raise CheckpointError("\n  ".join([head, *changed]))
    return tuple(f"step {saved.step}: {change}" for changes in inputs.values() for change in changes)


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            yield f"{name} was {json.dumps(saved.get(name))}, is {json.dumps(now.get(name))}"
