"""LoadedModel -> a folder that haotian-liu's LLaVA 1.5 (llava/model/builder.py, load_pretrained_model) reads.

A run that learned only the projector, on an LLM in Llama's or Mistral's own layout, becomes what LLaVA's pretraining
writes: mm_projector.bin and config.json, loaded with the base model. Every other run becomes a whole model with its
adapters merged: LLaVA's own adapter form has no place for an adapter of the tower, nor for one on InternLM2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dianjing.config.schema import Recipe
from dianjing.errors import ExportError
from dianjing.export.files import DTYPES, save_weights, write_json
from dianjing.export.foreign import copy_tokenizer, read_back, require_run
from dianjing.export.formats import Options
from dianjing.export.layout import LIVE_EMBEDDING, LIVE_HEAD, not_held, part_config
from dianjing.export.merge import merged_state
from dianjing.export.receipt import Proof, compare
from dianjing.formats.config import read_config
from dianjing.formats.llava import MLP, llava_name
from dianjing.infer.generate import Conversation, LoadedModel
from dianjing.model.folders import TINYWORLD, resolve
from dianjing.model.stage import part_of
from dianjing.model.weights import load_trainable_state, trainable_state

LANGUAGE_MODELS = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
"""model_type of an LLM that LLaVA can hold -> the model_type and class of the LLaVA with it."""
COMPARED = "the folder, read by Dianjing as it reads LLaVA's own, against the run"
LOADING = """\
The name of this folder must contain `llava` (and `mistral` for a Mistral): LLaVA goes by it.

```bash
python -m llava.serve.cli --model-path . --image-file picture.jpg
```

Where it holds only `mm_projector.bin`, add `--model-base LANGUAGE_MODEL`. `mm_vision_tower` in `config.json` names the
folder of the vision tower (VISION_TOWER); write there where yours is. LLaVA chooses the words around a question by
`--conv-mode`: it must be the chat template named above.
"""


def can_hold(tower: Any, projector: str, llm: Any) -> str | None:
    """Return why LLaVA 1.5 cannot hold a model: it knows CLIP alone, and has no class for the LLM."""
    if llm.model_type not in LANGUAGE_MODELS:
        kind = llm.model_type
        return f'LLaVA 1.5 holds Llama and Mistral, not "{kind}"; export for transformers (--format hf) instead'
    return not_held("llava", tower, projector)


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write the projector, or the whole model, into an existing folder.

    Raises:
        ExportError: there is no run, or `dtype` cannot hold its weights.
    """
    recipe = require_run(loaded, "LLaVA")
    if _projector_alone(recipe):
        learned = {llava_name(name): weight.cpu() for name, weight in trainable_state(loaded.model).items()}
        torch.save(
            {name: weight.to(DTYPES[options.dtype]) for name, weight in learned.items()}, folder / "mm_projector.bin"
        )
        write_json(folder / "config.json", _config(loaded, recipe, options, tied=_tied(loaded)))
        return
    merged = _merged(loaded, recipe)
    save_weights({llava_name(name): weight for name, weight in _rounded(merged, options).items()}, folder)
    write_json(folder / "config.json", _config(loaded, recipe, options, tied=LIVE_HEAD not in merged))
    copy_tokenizer(recipe, folder)


@torch.no_grad()
def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the folder, read back, answers compared with the run; what rounding costs is measured apart.

    Raises:
        ExportError: a weight is not what was to be written.
    """
    recipe = require_run(loaded, "LLaVA")
    other = read_back(loaded, recipe if _projector_alone(recipe) else _as_whole(recipe), folder)
    read = trainable_state(other.model)
    merged = {name: weight for name, weight in _merged(loaded, recipe).items() if name in read}
    expected = _rounded(merged, options)
    wrong = [name for name in read if not torch.equal(read[name], expected[name].float().to(read[name].device))]
    if wrong:
        raise ExportError(f"{wrong[0]} was read back as something else")
    if options.dtype == "fp32":
        return Proof(cases=compare(loaded, other, conversations), compared=COMPARED)
    rounded = compare(loaded, other, conversations)
    load_trainable_state(other.model, merged)
    cases = [
        replace(case, rounding_difference=cost.logit_difference, rounded_same_answer=cost.same_answer)
        for case, cost in zip(compare(loaded, other, conversations), rounded, strict=True)
    ]
    note = (
        f"weights in {options.dtype}: rounding moves the logits by up to {max(c.logit_difference for c in rounded):.1e}"
    )
    return Proof(cases=cases, compared=COMPARED, notes=(note,))


def _projector_alone(recipe: Recipe) -> bool:
    """Return whether only the projector was learned, on an LLM that LLaVA reads from its own folder."""
    base = read_config(resolve(recipe.language_model.folder, "language_model")).get("model_type")
    return recipe.language_model.tuning == recipe.vision_tower.tuning == "frozen" and base in LANGUAGE_MODELS


def _as_whole(recipe: Recipe) -> Recipe:
    """Return the recipe of a run that would have learned every weight of the export."""
    tower = "frozen" if recipe.vision_tower.tuning == "frozen" else "full"
    return replace(
        recipe,
        language_model=replace(recipe.language_model, tuning="full", quantization=""),
        vision_tower=replace(recipe.vision_tower, tuning=tower),
    )


def _merged(loaded: LoadedModel, recipe: Recipe) -> dict[str, Tensor]:
    """Return the weights of the whole model, adapters merged; a tower that was not tuned stays where it is."""
    merged = merged_state(loaded.model)
    if merged[LIVE_HEAD] is merged[LIVE_EMBEDDING]:
        del merged[LIVE_HEAD]
    tower = recipe.vision_tower.tuning != "frozen"
    return {name: weight for name, weight in merged.items() if tower or part_of(name) != "vision_tower"}


def _rounded(weights: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    found = {name: weight.to(DTYPES[options.dtype]).contiguous() for name, weight in weights.items()}
    for name, weight in found.items():
        if not weight.isfinite().all():
            raise ExportError(f"{name} has values that {options.dtype} cannot hold; take bf16")
    return found


def _tied(loaded: LoadedModel) -> bool:
    return bool(cast(Any, loaded.model.config).text_config.tie_word_embeddings)


def _config(loaded: LoadedModel, recipe: Recipe, options: Options, *, tied: bool) -> dict[str, Any]:
    config = cast(Any, loaded.model.config)
    model_type, architecture = LANGUAGE_MODELS[config.text_config.model_type]
    tower = resolve(recipe.vision_tower.folder, "vision_tower")
    return part_config(config.text_config, str(DTYPES[options.dtype]).removeprefix("torch.")) | {
        "architectures": [architecture],
        "model_type": model_type,
        "tie_word_embeddings": tied,
        "use_mm_proj": True,
        "mm_projector_type": MLP,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": recipe.vision_tower.folder
        if recipe.vision_tower.folder == TINYWORLD
        else str(tower.resolve()),
        "mm_vision_select_layer": recipe.vision_tower.feature_layer,
        "mm_vision_select_feature": "patch",
        # The tower's weights are read from here, not from mm_vision_tower, only when this says so.
        "unfreeze_mm_vision_tower": recipe.vision_tower.tuning != "frozen",
        "image_aspect_ratio": "pad" if recipe.data.aspect == "pad" else "square",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": config.text_config.max_position_embeddings,
    }
