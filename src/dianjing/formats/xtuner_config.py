"""XTuner's config of a LLaVA run -> the fields of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dianjing.data.template import TEMPLATES
from dianjing.errors import ConfigError
from dianjing.formats.checkpoint import Adapter
from dianjing.formats.python_config import read_python_config

Part = Literal["llm", "visual_encoder"]
DEFAULT_SELECT_LAYER = -2
PICTURE_TOKENS = 1024
"""Positions that a picture may add to a record (a tower of 448 pixels)."""
PACK_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class XTunerConfig:
    """The settings of a config that a recipe needs."""

    fields: dict[str, Any]
    """Of a recipe, by dotted name; those that the config does not tell are not there."""
    batch_size: int
    """Records on one GPU in one iteration."""
    accumulation: int
    """Iterations in one optimizer step."""
    adapters: dict[str, Adapter]
    lora_ranks: dict[str, int]
    """Rank of the LoRA of each part."""
    template: str
    """Chat template by name; "" when the config has one that we do not know."""
    notes: tuple[str, ...]
    """Differences from XTuner when training goes on."""


def read_xtuner_config(text: str, where: str) -> XTunerConfig:
    """Return what XTuner's config, as a file or as a checkpoint keeps it, says.

    Raises:
        ConfigError: it cannot be read without running it, is not of a LLaVA run, or has a value of the wrong kind.
    """
    values = read_python_config(text, where)
    try:
        return _read_values(values, where)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"{where}: a value in it is not of its kind ({error}); correct it") from None


def _read_values(values: Mapping[str, Any], where: str) -> XTunerConfig:
    model = values.get("model")
    if not isinstance(model, dict) or "visual_encoder" not in model:
        raise ConfigError(f"{where}: no config of a LLaVA run: model.visual_encoder is not in it")
    loader = _table(values, "train_dataloader")
    optimization = _table(values, "optim_wrapper")
    optimizer = _table(optimization, "optimizer")
    loras = {part: _table(model, f"{part}_lora") for part in ("llm", "visual_encoder")}
    for part, lora in loras.items():
        require_plain_lora(lora, f"{where}: model.{part}_lora")
    sampler = str(_table(loader, "sampler").get("type", ""))
    clip = _table(optimization, "clip_grad").get("max_norm", 0)
    hooks = _table(values, "default_hooks")
    accumulation = int(optimization.get("accumulative_counts", values.get("accumulative_counts", 1)))
    fields = {
        **_model_fields(model, values),
        **_data_fields(loader.get("dataset", {}), where),
        "data.order": "length_grouped" if sampler.endswith("LengthGroupedSampler") else "shuffle",
        "data.workers": loader.get("num_workers"),
        "train.learning_rate": optimizer.get("lr"),
        "train.betas": list(optimizer["betas"]) if "betas" in optimizer else None,
        "train.weight_decay": optimizer.get("weight_decay"),
        "train.clip_norm": clip,
        **_length(_table(values, "train_cfg"), accumulation),
        "train.warmup_ratio": _warmup_ratio(values),
        "train.log_every": _table(hooks, "logger").get("interval"),
        "train.save_every": _save_every(hooks, accumulation),
    }
    return XTunerConfig(
        fields={name: value for name, value in fields.items() if value is not None},
        batch_size=int(loader.get("batch_size", values.get("batch_size", 1))),
        accumulation=accumulation,
        adapters={
            part: Adapter(alpha=float(lora["lora_alpha"]), dropout=float(lora.get("lora_dropout", 0)))
            for part, lora in loras.items()
            if "lora_alpha" in lora
        },
        template=template_name(_prompt_template(values, loader)),
        lora_ranks={part: int(lora["r"]) for part, lora in loras.items() if "r" in lora},
        notes=tuple(_notes(values, optimizer, sampler)),
    )


def require_plain_lora(lora: Mapping[str, Any], where: str) -> None:
    """Refuse a LoRA that is more than two matrices and a scale.

    Raises:
        ConfigError: the setting is named.
    """
    for name in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if lora.get(name):
            raise ConfigError(f"{where}: {name} is set, which cannot be read; only plain LoRA can")
    if lora.get("bias", "none") != "none":
        raise ConfigError(f'{where}: bias = "{lora["bias"]}", which cannot be read; only LoRA without biases can')


def _model_fields(model: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    llm, tower = _table(model, "llm"), _table(model, "visual_encoder")
    return {
        "language_model.folder": llm.get("pretrained_model_name_or_path", values.get("llm_name_or_path")),
        "language_model.quantization": "nf4" if _table(llm, "quantization_config").get("load_in_4bit") else None,
        "vision_tower.folder": tower.get("pretrained_model_name_or_path", values.get("visual_encoder_name_or_path")),
        "vision_tower.feature_layer": model.get("visual_select_layer", DEFAULT_SELECT_LAYER),
    }


def _data_fields(dataset: Any, where: str) -> dict[str, Any]:
    """Return the fields of [data]; data sets with a picture folder each are left out: the user joins them."""
    parts = dataset.get("datasets", [dataset]) if isinstance(dataset, dict) else []
    parts = [part for part in parts if isinstance(part, dict) and "data_path" in part]
    if not parts:
        return {}
    for name in ("max_length", "pad_image_to_square"):
        if len({part.get(name) for part in parts}) > 1:
            raise ConfigError(
                f"{where}: its data sets differ in {name}, which one run of ours cannot; give another config"
            )
    first = parts[0]
    max_tokens = first.get("max_length")
    paths = [str(part["data_path"]) for part in parts]
    one_folder = len({part.get("image_folder") for part in parts}) == 1
    return {
        "data.path": None if not one_folder else paths if len(paths) > 1 else paths[0],
        "data.images": first.get("image_folder") if one_folder else None,
        "data.aspect": "pad" if first.get("pad_image_to_square") else "crop",
        "data.max_tokens": max_tokens,
        "data.pack_tokens": max(PACK_TOKENS, max_tokens + PICTURE_TOKENS) if max_tokens else None,
        "data.on_long_record": "truncate",
    }


def template_name(prompt_template: Any) -> str:
    """Return the name of a chat template that a config gives by its dotted path, or in full; "" = none that we have.

    xtuner.utils.PROMPT_TEMPLATE.internlm2_chat -> internlm2_chat
    """
    if isinstance(prompt_template, str):
        name = prompt_template.rpartition(".")[2]
        return name if name in TEMPLATES else ""
    if isinstance(prompt_template, dict):
        wanted = (prompt_template.get("INSTRUCTION"), prompt_template.get("SUFFIX", ""), prompt_template.get("SEP", ""))
        for name, template in TEMPLATES.items():
            if (template.instruction, template.suffix, template.sep) == wanted:
                return name
    return ""


def _prompt_template(values: Mapping[str, Any], loader: Mapping[str, Any]) -> Any:
    dataset = _table(loader, "dataset")
    return _table(dataset, "template_map_fn").get("template", values.get("prompt_template"))


def _warmup_ratio(values: Mapping[str, Any]) -> float | None:
    """Return the end of the first schedule, when a second begins there."""
    schedules = _schedules(values)
    if len(schedules) != 2:
        return 0.0 if schedules else None
    warmup, rest = (schedule.get("end") for schedule in schedules)
    whole = rest or _table(values, "train_cfg").get("max_epochs")
    return float(warmup) / float(whole) if warmup and whole else None


def _schedules(values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    found = values.get("param_scheduler") or []
    return [found] if isinstance(found, dict) else found


def _length(loop: Mapping[str, Any], accumulation: int) -> dict[str, Any]:
    """Return how long the run is: a number of epochs, or of iterations, however many epochs these are."""
    if loop.get("max_iters"):
        steps = int(loop["max_iters"]) // accumulation
        return {"train.epochs": steps, "train.max_steps": steps}
    return {"train.epochs": loop.get("max_epochs")}


def _save_every(hooks: Mapping[str, Any], accumulation: int) -> int | None:
    interval = _table(hooks, "checkpoint").get("interval", 0)
    return max(int(interval) // accumulation, 1) if interval and interval > 0 else None


def _notes(values: Mapping[str, Any], optimizer: Mapping[str, Any], sampler: str) -> list[str]:
    notes: list[str] = []
    kinds = [str(schedule.get("type", "")).rpartition(".")[2] for schedule in _schedules(values)]
    floors = [schedule for schedule in _schedules(values) if schedule.get("eta_min")]
    if kinds not in (["LinearLR", "CosineAnnealingLR"], ["CosineAnnealingLR"]) or floors:
        notes.append(f"its learning rate follows {' and '.join(kinds) or 'nothing'}; here: linear, then a cosine to 0")
    if not str(optimizer.get("type", "AdamW")).endswith("AdamW"):
        notes.append(f"its optimizer is {optimizer['type']}; here it is AdamW")
    if optimizer.get("eps", 1e-8) != 1e-8:
        notes.append(f"its AdamW has eps {optimizer['eps']}; here it is 1e-08")
    if sampler and not sampler.endswith(("LengthGroupedSampler", "DefaultSampler")):
        notes.append(f"its records are ordered by {sampler}; here they are shuffled")
    if _table(_table(_table(values, "model"), "llm"), "quantization_config").get("load_in_8bit"):
        notes.append("its LLM was held in 8 bits; here it is in the run's precision")
    return notes


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}
