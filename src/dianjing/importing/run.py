"""Import of a checkpoint from elsewhere: it becomes a run with a recipe and one checkpoint."""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from dianjing.config.fields import check, known_field
from dianjing.config.load import load_recipe, make_recipe, save_recipe
from dianjing.config.schema import Recipe
from dianjing.config.steps import total_steps
from dianjing.data.dataset import Dataset, open_dataset
from dianjing.errors import ConfigError, DataError, ModelError
from dianjing.formats.checkpoint import Adapter, Foreign
from dianjing.formats.internlm2 import HeadsError
from dianjing.formats.source import open_foreign
from dianjing.formats.weights import name_some
from dianjing.formats.xtuner import Translation, live_parts, require_two_layers, to_live
from dianjing.formats.xtuner_config import XTunerConfig, read_xtuner_config
from dianjing.model.build import Built, build
from dianjing.model.folders import TINYWORLD, base_folders
from dianjing.model.forward import num_tower_layers
from dianjing.model.stage import apply_stage
from dianjing.model.weights import trainable_state
from dianjing.run.checkpoint import save
from dianjing.run.fingerprints import fingerprints
from dianjing.run.layout import RECIPE
from dianjing.run.state import TrainState, state_at

SECTIONS = {"llm": "language_model", "visual_encoder": "vision_tower"}
"""XTuner's name of a part -> the recipe's section."""
FLAGS = {"llm": "--llm", "visual_encoder": "--vision-tower"}
ALPHA_FLAGS = {"llm": "--llm-alpha", "visual_encoder": "--tower-alpha"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Accepted dtypes of stored weights."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Facts about a checkpoint that the user gives; "" and 0 leave them to the checkpoint."""

    config: Path | None = None
    llm: str = ""
    vision_tower: str = ""
    data: str = ""
    images: str = ""
    template: str = ""
    gpus: int = 0
    llm_alpha: float = 0.0
    tower_alpha: float = 0.0
    weights_only: bool = False


def import_run(source: Path, out: Path, options: ImportOptions) -> list[str]:
    """Write the run and return what was found, a line each.

    Raises:
        DianjingError: the checkpoint cannot be read, does not fit the LLM, the tower or the data, or `out` is there
            or cannot be written; nothing is left of it then.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{out}: already there; remove it or give another name")
    foreign = open_foreign(source, optimizer=not options.weights_only)
    config = _config_of(foreign, source, options)
    recipe = _recipe(foreign, config, source, out, options)
    # Names and shapes are compared, not numbers: half the memory will do.
    light = replace(recipe, train=replace(recipe.train, precision="bf16"))
    light = replace(light, language_model=replace(light.language_model, quantization=""))
    built = build(light, fresh_projector=True)
    apply_stage(built.model, light)
    text_config = built.model.config.text_config
    try:
        found = to_live(foreign.weights, text_config, num_tower_layers(built.model))
    except HeadsError as error:
        raise ModelError(f"{source}: {error} (--llm)") from None
    _require_match(found, trainable_state(built.model), source)
    optimizer = {} if options.weights_only else _optimizer_state(foreign, found, text_config, source)
    fresh = not optimizer and not foreign.iteration and bool(options.data) and not options.weights_only
    if fresh:
        optimizer = _new_optimizer_state(found.live)
    dataset, why_not = _dataset(recipe, built, foreign, config, bool(options.data)) if optimizer else (None, "")
    accumulation = config.accumulation if config else 1
    state = _write(out, recipe, foreign.iteration // accumulation, dataset, found.live, optimizer)
    return [*_report(foreign, found, optimizer, fresh), *_outlook(state, dataset, why_not, config)]


def _write(
    out: Path,
    recipe: Recipe,
    step: int,
    dataset: Dataset | None,
    learned: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> TrainState:
    """Write the run under another name next to `out`, rename it, and return its state."""
    try:
        if not out.parent.exists():
            out.parent.mkdir(parents=True)
        with TemporaryDirectory(prefix="unfinished-", dir=out.parent, ignore_cleanup_errors=True) as place:
            unfinished = Path(place, out.name)
            unfinished.mkdir()
            save_recipe(recipe, unfinished / RECIPE)
            recipe = load_recipe(unfinished / RECIPE)
            state = state_at(step, recipe, dataset, fingerprints(*base_folders(recipe), dataset))
            trained = {name: weight.float().contiguous() for name, weight in learned.items()}
            save(unfinished, trained, optimizer, state, keep=1)
            unfinished.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}; choose another place") from None
    except UnicodeEncodeError:
        raise ConfigError(
            f"{out}: cannot be written: its name, or that of a folder the run needs, is not UTF-8; rename it"
        ) from None
    return state


def _config_of(foreign: Foreign, source: Path, options: ImportOptions) -> XTunerConfig | None:
    if options.config:
        try:
            text = options.config.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{options.config}: cannot be read: {error}; --config names XTuner's config") from None
        return read_xtuner_config(text, str(options.config))
    return read_xtuner_config(foreign.config, f"{source} (its config)") if foreign.config else None


def _recipe(foreign: Foreign, config: XTunerConfig | None, source: Path, out: Path, options: ImportOptions) -> Recipe:
    """Return the recipe that would have made the checkpoint.

    Raises:
        ConfigError: something is not known and must be given; the flag is named.
    """
    require_two_layers(foreign.weights, source)
    parts = {part: _tuning(part, foreign, config, source, options) for part in SECTIONS}
    tuned = any(fields[f"{SECTIONS[part]}.tuning"] != "frozen" for part, fields in parts.items())
    given = {
        "language_model.folder": options.llm,
        "vision_tower.folder": options.vision_tower,
        "data.path": options.data,
        "data.images": options.images,
        "language_model.template": options.template,
    }
    values: dict[str, Any] = {
        "data.path": "",
        # as XTuner and LLaVA read pictures
        "data.transparency": "drop",
        "data.profiles": "ignore",
        **foreign.settings,
        **(config.fields if config else {}),
        **parts["llm"],
        **parts["visual_encoder"],
        **{name: value for name, value in given.items() if value},
        "stage": "finetune" if tuned else "pretrain",
        "output": str(out),
    }
    if config:
        values.setdefault("language_model.template", config.template)
        values["train.global_batch_size"] = (
            config.batch_size * config.accumulation * (options.gpus or foreign.ranks or 1)
        )
        if not values["language_model.template"]:
            raise ConfigError(f"{source}: its chat template is unknown; give --template NAME")
    if options.data and not options.images:
        values["data.images"] = ""  # of another machine
    if foreign.seed is not None:
        values["seed"] = foreign.seed
    if values["language_model.tuning"] == "full":
        values["language_model.quantization"] = ""
    for part, section in SECTIONS.items():
        _require_folder(values.get(f"{section}.folder", ""), part, source)
    return make_recipe(
        {name: check(known_field(name, str(source)), value, str(source)) for name, value in values.items()}
    )


def _tuning(
    part: str, foreign: Foreign, config: XTunerConfig | None, source: Path, options: ImportOptions
) -> dict[str, Any]:
    """Return how a part was tuned, by its tensors and the files next to them."""
    section = SECTIONS[part]
    names = [name for name in foreign.weights if name.startswith(f"{part}.")]
    adapted = [name for name in names if ".lora_A." in name]
    if not adapted:
        return {f"{section}.tuning": "full" if names else "frozen"}
    ranks = {shape[0] if (shape := foreign.weights[name].shape) else 0 for name in adapted}
    if len(ranks) > 1:
        raise ModelError(f"{source}: the LoRA of {part} has ranks {sorted(ranks)}; only one rank for all can be read")
    (rank,) = ranks
    stated = config.lora_ranks.get(part, rank) if config else rank
    if stated != rank:
        raise ConfigError(
            f"{source}: the LoRA of {part} has rank {rank}, but the config says {stated}; give the config of this run"
        )
    adapter = foreign.adapters.get(part) or (config.adapters.get(part) if config else None)
    alpha = options.llm_alpha if part == "llm" else options.tower_alpha
    if alpha:
        adapter = Adapter(alpha=alpha, dropout=adapter.dropout if adapter else 0.0)
    if not adapter:
        raise ConfigError(
            f"{source}: the alpha of the LoRA of {part} is not in it, and without it the LoRA has no size; give the "
            f"config (--config xtuner_config.py), or {ALPHA_FLAGS[part]} NUMBER"
        )
    fields = {
        f"{section}.tuning": "lora",
        f"{section}.lora_rank": rank,
        f"{section}.lora_alpha": adapter.alpha,
        f"{section}.lora_dropout": adapter.dropout,
    }
    if part == "llm":
        inside = [name.partition("base_model.model.")[2] for name in adapted]
        fields["language_model.lora_head"] = any(name.startswith(("output.", "lm_head.")) for name in inside)
        fields["language_model.lora_share_qkv"] = any(".wqkv." in name for name in inside)
    return fields


def _require_folder(folder: Any, part: str, source: Path) -> None:
    if isinstance(folder, str) and (folder == TINYWORLD or os.path.isdir(os.path.expanduser(folder))):
        return
    what = "LLM" if part == "llm" else "vision tower"
    named = (
        f'names its {what} as "{folder}", which is not a folder here' if folder else f"does not say what its {what} is"
    )
    raise ConfigError(f"{source}: it {named}; give {FLAGS[part]} DIR")


def _require_match(found: Translation, own: Mapping[str, Tensor], source: Path) -> None:
    """Refuse weights that are not exactly what trains in the model of the recipe.

    Raises:
        ModelError: missing, unexpected and misshapen tensors are named.
    """
    shapes = [
        f"{name} ({_size(found.live[name].shape)} in the checkpoint, {_size(own[name].shape)} here)"
        for name in own
        if name in found.live and found.live[name].shape != own[name].shape
    ]
    faults: dict[str, Iterable[str]] = {
        "of another size": shapes,
        "missing": own.keys() - found.live.keys(),
        "unexpected": [*found.unknown, *(found.live.keys() - own.keys())],
    }
    wrong = [f"{name_some(names)} {fault}" for fault, names in faults.items() if names]
    if wrong:
        raise ModelError(
            "\n  ".join(
                [f"{source}: it belongs to another LLM or vision tower than --llm and --vision-tower name:", *wrong]
            )
        )
    stored = [f"{name} ({weight.dtype})" for name, weight in found.live.items() if weight.dtype not in DTYPES]
    if stored:
        raise ModelError(f"{source}: {name_some(stored)} cannot be read; save it again in fp32, bf16 or fp16")
    unusable = [name for name, weight in found.live.items() if not weight.isfinite().all()]
    if unusable:
        raise ModelError(
            f"{source}: {name_some(unusable)} hold values that are not finite: the run had failed when this was saved; "
            "take an earlier checkpoint"
        )


def _require_usable(moments: Mapping[str, Tensor], weight: Tensor, where: str) -> None:
    """Refuse what cannot be AdamW's state of a weight.

    Raises:
        ModelError: it has another shape, or values that AdamW cannot reach.
    """
    for kind, value in moments.items():
        shape = torch.Size() if kind == "step" else weight.shape
        if value.shape != shape:
            fault = f"is of size {_size(value.shape)}, not {_size(shape)}"
        elif value.dtype not in DTYPES:
            fault = f"is of {value.dtype}"
        elif not value.isfinite().all():
            fault = "has values that are not finite"
        elif kind != "exp_avg" and (value < 0).any():
            fault = "is below 0"
        else:
            continue
        raise ModelError(
            f"{where}: {kind} in the optimizer's state {fault}; take an earlier checkpoint, or give --weights-only to "
            "leave it out: the run can be asked, but not trained on"
        )


def _optimizer_state(foreign: Foreign, found: Translation, text_config: Any, source: Path) -> dict[str, Tensor]:
    """Return AdamW's state under our names; nothing if it does not cover all that trains.

    Raises:
        ModelError: a tensor of it cannot be AdamW's state of the weight it is named after.
    """
    state: dict[str, Tensor] = {}
    for name, moments in foreign.moments.items():
        if name in foreign.weights:
            _require_usable(moments, foreign.weights[name], f"{source}: {name}")
        for kind in ("exp_avg", "exp_avg_sq"):
            parts = live_parts(name, moments[kind], text_config)
            state |= {f"{live}/{kind}": part.float().contiguous() for live, part in parts.items() if live in found.live}
        state |= {f"{live}/step": moments["step"].clone() for live in parts if live in found.live}
    return state if {key.rpartition("/")[0] for key in state} == found.live.keys() else {}


def _new_optimizer_state(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return AdamW's state before its first step, for weights that come without one."""
    state: dict[str, Tensor] = {}
    for name, weight in learned.items():
        state |= {f"{name}/{kind}": torch.zeros(weight.shape) for kind in ("exp_avg", "exp_avg_sq")}
        state[f"{name}/step"] = torch.tensor(0.0)
    return state


def _dataset(
    recipe: Recipe, built: Built, foreign: Foreign, config: XTunerConfig | None, required: bool
) -> tuple[Dataset | None, str]:
    """Return the run's data, or why it cannot be used.

    Raises:
        DataError: the data that --data names cannot be used, or is not what the run was trained on.
    """
    paths = (recipe.data.path,) if isinstance(recipe.data.path, str) else recipe.data.path
    gone = [path for path in (*paths, recipe.data.images) if path and not os.path.exists(os.path.expanduser(path))]
    if not required and (gone or not recipe.data.path):
        return None, f"its data ({', '.join(gone) or 'not named'}) is not here; import again with --data and --images"
    dataset = open_dataset(recipe.data, built.encoder, built.image_processor)
    if config and foreign.last_iteration and not recipe.train.max_steps:
        records = dataset.num_records
        in_iteration = recipe.train.global_batch_size // config.accumulation
        expected = recipe.train.epochs * -(-records // in_iteration)
        if expected != foreign.last_iteration:
            raise DataError(
                f"{recipe.data.path}: {records} records in batches of {in_iteration} make {expected} iterations, but "
                f"the run was to have {foreign.last_iteration}; give its own data (--data), or its GPUs (--gpus)"
            )
    step, end = foreign.iteration // (config.accumulation if config else 1), total_steps(recipe, dataset.num_records)
    if step > end:
        raise DataError(
            f"{recipe.data.path}: a run on its {dataset.num_records} records ends at step {end}, but the checkpoint is "
            f"of step {step}; give its own data (--data), or its GPUs (--gpus), or --weights-only: the run can be "
            "asked, but not trained on"
        )
    return dataset, ""


def _report(foreign: Foreign, found: Translation, optimizer: Mapping[str, Tensor], fresh: bool) -> list[str]:
    numbers = sum(weight.numel() for weight in found.live.values())
    dropped = sum(map(len, found.dropped.values()))
    lines = [
        f"{foreign.kind}: {len(foreign.weights)} tensors",
        f"matched: {len(foreign.weights) - dropped}, as {len(found.live)} of ours ({numbers:,} parameters)",
        "missing: 0, unexpected: 0",
    ]
    lines += [f"dropped: {len(names)}, {reason} ({name_some(names)})" for reason, names in found.dropped.items()]
    tensors = len({key.rpartition("/")[0] for key in optimizer})
    if fresh:
        lines.append("optimizer: none in it; training begins with a new one")
    else:
        lines.append(f"optimizer: AdamW's state of {tensors} tensors" if optimizer else "optimizer: none")
    return lines


def _outlook(state: TrainState, dataset: Dataset | None, why_not: str, config: XTunerConfig | None) -> list[str]:
    if not dataset:
        return [f"it can be asked and exported, not trained on: {why_not or 'the optimizer is not in it'}"]
    if state.step == state.total_steps:
        return [f"it can be asked and exported; its training has ended: step {state.step} of {state.total_steps}"]
    lines = [f"it can be trained on: step {state.step} of {state.total_steps}"]
    if config and config.accumulation > 1:
        lines.append("note: XTuner moves its learning rate each iteration, we each optimizer step")
    return lines + [f"note: {note}" for note in (config.notes if config else ())]


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "1"
