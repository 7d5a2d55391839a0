"""Faults that a run has before its first step, by its recipe and by the run its projector comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from dianjing.config.fields import recipe_fields
from dianjing.config.schema import Recipe
from dianjing.data.dataset import Dataset
from dianjing.errors import ModelError, TrainError
from dianjing.model.forward import num_tower_layers
from dianjing.model.stage import StageReport
from dianjing.run.checkpoint import find_checkpoint, read_state
from dianjing.train.optim import warmup_steps

MOST_WARMUP = 0.5
"""Share of a run's steps; a longer warm-up is most of the run."""
EYES = {
    "vision_tower": "the weights or config.json of vision_tower.folder",
    "preprocessing": "the preprocessor_config.json of vision_tower.folder",
}
"""Fingerprints that must be those that a projector was trained with; and the files they are of."""
SPEECH = {"language_model": "language_model.folder", "tokenizer": "the tokenizer or template of language_model.folder"}
"""Fingerprints that may be others, as when a base LLM is replaced by its chat version."""
FEATURE_LAYER = "feature_layer"
CAN_DIFFER = (*EYES, FEATURE_LAYER)
"""Names that --allow-changed takes on where a projector comes from."""


def require_pictures(dataset: Dataset, stage: str) -> None:
    """Refuse to pretrain a projector on text.

    Raises:
        TrainError: no record of the data set has a picture.
    """
    if stage == "pretrain" and not dataset.report.get("pictures"):
        raise TrainError(
            f"{dataset.config.path}: no record has a picture, so the projector has nothing to learn from; give "
            "records with an 'image'"
        )


def require_learning(recipe: Recipe, stage: StageReport, steps: int, warn: Callable[[str], object]) -> None:
    """Refuse a run in which nothing would change; `warn` gets a line for each part that would not, and other doubts.

    Raises:
        TrainError: each part that trains has learning rate 0, or LoRA has found no layer.
    """
    trained = [part for part in stage.parts if part.trainable]
    if not any(part.learning_rate for part in trained):
        raise TrainError("the learning rate of all that trains is 0, so nothing would change; set train.learning_rate")
    for part in stage.parts:
        section = part.part.replace(" ", "_")
        if part.trainable and not part.learning_rate:
            warn(
                f"{section}.learning_rate is 0: the {part.part} is trained, but will not change; remove it, or raise it"
            )
        if part.tuning == "lora" and not part.trainable:
            raise TrainError(f"{section}.tuning: LoRA found no linear layer in the {part.part}; use another tuning")
        fields = {name: field for name, field in recipe_fields().items() if name.startswith(f"{section}.lora_")}
        changed = [
            name for name, field in fields.items() if getattr(getattr(recipe, section), field.key) != field.default
        ]
        if part.tuning == "frozen" and recipe.stage == "finetune" and changed:
            warn(
                f'{", ".join(changed)}: not used, since {section}.tuning is "frozen": the {part.part} does not '
                'train; set it to "lora"'
            )
    if (warmup := warmup_steps(steps, recipe.train.warmup_ratio)) > MOST_WARMUP * steps:
        warn(
            f"train.warmup_ratio is {recipe.train.warmup_ratio:g}: the rate still rises at step {warmup:,} of "
            f"{steps:,}; 0.03 is usual"
        )


def require_same_eyes(
    recipe: Recipe,
    model: LlavaForConditionalGeneration,
    found: Mapping[str, str],
    allowed: Collection[str],
    warn: Callable[[str], object],
) -> list[str]:
    """Refuse a vision tower that is not the one the projector of `projector.init_from` was trained with.

    `found` are the fingerprints of this run. Return the differences that were `allowed`; `warn` gets a line on them
    and on another LLM.

    Raises:
        ModelError: tower, preprocessing or feature layer differ; each is named.
    """
    source = Path(recipe.projector.init_from).expanduser()
    checkpoint = find_checkpoint(source, lambda _: None) if recipe.projector.init_from else None
    if not checkpoint:  # a new projector, or one that XTuner or LLaVA has trained
        return []
    before = read_state(checkpoint)
    differ = {
        name: f"{words} differ from those it was trained with"
        for name, words in EYES.items()
        if before.fingerprints.get(name, found[name]) != found[name]
    }
    layer, here = before.recipe.get("vision_tower.feature_layer"), recipe.vision_tower.feature_layer
    if layer is not None and _layer(model, int(layer)) != num_tower_layers(model):
        differ[FEATURE_LAYER] = f"vision_tower.feature_layer was {layer}, is {here}"
    if refused := {name: words for name, words in differ.items() if name not in allowed}:
        flags = " ".join(f"--allow-changed {name}" for name in refused)
        raise ModelError(
            "\n  ".join(
                [
                    f"{source}: its projector would see other features than it was trained on; use the same tower, "
                    f"or pretrain again, or, if this is meant, give {flags}:",
                    *refused.values(),
                ]
            )
        )
    for words in differ.values():
        warn(f"{source}: allowed: {words}")
    for name, words in SPEECH.items():
        if before.fingerprints.get(name, found[name]) != found[name]:
            warn(f"{source}: its projector was trained with another {words}; expect a higher loss at first")
    return [f"projector of {source}: {words}" for words in differ.values()]


def _layer(model: LlavaForConditionalGeneration, layer: int) -> int | None:
    """Return how many layers of the tower lie below a feature layer, None where the tower has fewer."""
    tower: Any = model.config.vision_config
    number = tower.num_hidden_layers + 1
    return range(number)[layer] if -number <= layer < number else None
