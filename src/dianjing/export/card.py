"""Export -> README.md, its model card."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dianjing import __version__
from dianjing.config.schema import Recipe
from dianjing.errors import CheckpointError
from dianjing.export.formats import FORMATS
from dianjing.export.receipt import Proof
from dianjing.infer.generate import LoadedModel
from dianjing.run.checkpoint import newest, read_state
from dianjing.run.state import TrainState

PARTS = ("language_model", "vision_tower")


def write_card(loaded: LoadedModel, folder: Path, format: str, proof: Proof) -> None:
    """Write README.md: how the model was made, how it is loaded, how far it equals its run.

    In how a format is loaded, LANGUAGE_MODEL and VISION_TOWER stand for the base models.
    """
    recipe, loading = loaded.recipe, FORMATS[format].code.LOADING
    bases = {part: base_name(getattr(recipe, part).folder) for part in PARTS} if recipe else {}
    for part, name in bases.items():
        loading = loading.replace(part.upper(), name)
    source = files("dianjing.export").joinpath("card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    text = environment.from_string(source).render(
        name=Path(loaded.name).name,
        version=__version__,
        format=format,
        what=", only what was learned" if FORMATS[format].learned_only else "",
        library=FORMATS[format].library,
        recipe=recipe,
        bases=bases,
        base_models=[name for name in bases.values() if _on_hub(name)],
        tuning=_tuning(recipe) if recipe else {},
        state=_state(loaded),
        template=loaded.encoder.template.name,
        loading=loading,
        cases=len(proof.cases),
        compared=proof.compared,
        parity=f"{proof.max_logit_difference:.1e}",
        same=", the same greedy answers" if all(case.same_answer for case in proof.cases) else "",
        notes=proof.notes,
        rule=loaded.picture_rule,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def base_name(folder: str) -> str:
    """Return a base model's name on the hub where its folder tells it, else the name of the folder.

    ~/.cache/huggingface/hub/models--internlm--internlm2-chat-7b/snapshots/70e6cdc -> internlm/internlm2-chat-7b
    """
    for part in Path(folder).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return Path(folder).name if Path(folder).expanduser().is_dir() else folder


def _on_hub(name: str) -> bool:
    return "/" in name


def _tuning(recipe: Recipe) -> Mapping[str, str]:
    words = {"frozen": "frozen", "full": "all weights trained"}
    found = {}
    for part in PARTS:
        config = getattr(recipe, part)
        lora = f"LoRA (rank {config.lora_rank}, alpha {config.lora_alpha:g})"
        held = getattr(config, "quantization", "")
        found[part] = words.get(config.tuning, lora) + (f", its own weights in {held}" if held else "")
    return found


def _state(loaded: LoadedModel) -> TrainState | None:
    """Return how far the run came; None for an adapter, which does not say."""
    try:
        return read_state(newest(Path(loaded.name).expanduser(), notify=lambda text: None))
    except CheckpointError:
        return None
