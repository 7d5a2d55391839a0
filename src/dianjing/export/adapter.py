"""LoadedModel -> a small folder with what was learned only: LoRA weights in peft's format, and the projector."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from dianjing.config.schema import Recipe
from dianjing.errors import ExportError
from dianjing.export.formats import Options
from dianjing.export.merge import merged_state
from dianjing.export.receipt import Case, Proof, compare
from dianjing.infer.generate import Conversation, LoadedModel
from dianjing.infer.load import load_for_use
from dianjing.model.adapter import PARTS, save_adapter
from dianjing.model.build import assemble, build
from dianjing.model.folders import resolve
from dianjing.model.language import load_language_model
from dianjing.model.stage import part_of
from dianjing.model.towers.families import load_tower, prepared_size
from dianjing.model.weights import PROJECTOR_FILE

COMPARED = "the folder on its bases, read by Dianjing (first half) and by plain peft (second), against the run"
LOADING = """\
It stands on two base models, which `recipe.toml` names and `bases.json` describes:

- language model: `LANGUAGE_MODEL`
- vision tower: `VISION_TOWER`

Ask it (`language_model.folder` and `vision_tower.folder` in `recipe.toml` say where the bases lie):

```bash
dianjing chat .
```

```python
from PIL import Image

from dianjing.infer.generate import Conversation, generate
from dianjing.infer.load import load_for_use

picture = Image.new("RGB", (80, 60), "red")  # your picture
print(generate(load_for_use("."), [Conversation((), "<image>\\nWhat is in the picture?", [picture])])[0])
```

`language_model/` and `vision_tower/`, where they are there, are adapters for
`peft.PeftModel.from_pretrained(base, folder)`.
"""


def can_hold(tower: Any, projector: str, llm: Any) -> str | None:
    """Return None: it holds every model."""
    return None


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write what was learned into an existing folder.

    Raises:
        ExportError: there is no run, or it changed every weight of a part.
    """
    recipe = _recipe(loaded)
    for part in PARTS:
        if getattr(recipe, part).tuning == "full":
            raise ExportError(
                f'{part}.tuning was "full": all its weights changed, so there is nothing small to export; '
                "export the whole model (--format hf)"
            )
    save_adapter(loaded.model, recipe, folder)


def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the adapter answers compared with the run: read by us, then by peft alone.

    A run whose LLM is in four bits learned on these values: peft is given them, dequantised. What it costs to
    put the adapter on the base's own values is measured and reported.
    """
    recipe = _recipe(loaded)
    cases = compare(loaded, load_for_use(str(folder), str(loaded.model.device)), conversations)
    quantization = recipe.language_model.quantization
    plain = compare(loaded, _by_peft(loaded, folder, _base_values(recipe) if quantization else {}), conversations)
    notes: tuple[str, ...] = ()
    if quantization:
        unquantized = compare(loaded, _by_peft(loaded, folder, {}), conversations)
        plain = [_with_cost(case, other) for case, other in zip(plain, unquantized, strict=True)]
        cost = max(case.logit_difference for case in unquantized)
        notes = (
            f"plain peft is compared on the base in {quantization}, which the run learned on; on the base's own "
            f"weights the logits move by up to {cost:.1e}",
        )
    return Proof(cases=cases + plain, compared=COMPARED, notes=notes)


def _recipe(loaded: LoadedModel) -> Recipe:
    if loaded.recipe is None:
        raise ExportError(f"{loaded.name} is not a run; only what a run has learned can be exported as an adapter")
    return loaded.recipe


def _with_cost(case: Case, other: Case) -> Case:
    return replace(case, rounding_difference=other.logit_difference, rounded_same_answer=other.same_answer)


def _by_peft(loaded: LoadedModel, folder: Path, llm_values: Mapping[str, Tensor]) -> LoadedModel:
    """Return the model as one who knows only peft and the bases puts it together."""
    recipe = _recipe(loaded)
    llm: Any = load_language_model(resolve(recipe.language_model.folder, "language_model"), torch.float32)[0]
    tower_folder = resolve(recipe.vision_tower.folder, "vision_tower")
    tower: Any = load_tower(tower_folder, torch.float32)[0]
    if llm_values:
        llm.load_state_dict(llm_values)
    for part, base in (("language_model", llm), ("vision_tower", tower)):
        if (folder / part).is_dir():
            _put_on(base, folder / part)
    image_id, layer = loaded.encoder.image_token_id, recipe.vision_tower.feature_layer
    size, kind = prepared_size(tower_folder, tower.config), recipe.projector.kind
    model: Any = assemble(llm, tower, image_id, layer, seed=0, kind=kind, size=size)
    model.model.multi_modal_projector.load_state_dict(load_file(folder / PROJECTOR_FILE))
    return replace(loaded, model=model.to(loaded.model.device).eval())


def _put_on(base: Any, adapter: Path) -> None:
    with warnings.catch_warnings():
        # peft asks by a name that transformers will drop.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        PeftModel.from_pretrained(base, str(adapter))


def _base_values(recipe: Recipe) -> dict[str, Tensor]:
    """Return the weights of the LLM as the run holds them before any adapter, in fp32, by the LLM's own names."""
    state = merged_state(build(recipe, fresh_projector=True).model)
    return {
        name.replace("model.language_model.", "model."): weight
        for name, weight in state.items()
        if part_of(name) == "language_model"
    }
