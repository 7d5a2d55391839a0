"""LoadedModel -> a folder as `xtuner convert pth_to_hf` writes it.

It is for `xtuner chat LLM --llava FOLDER` and `xtuner mmbench`:

    llm_adapter/             the LLM's LoRA, on InternLM2 of its own wqkv
    visual_encoder_adapter/  the tower's LoRA
    visual_encoder/          instead: the whole tower, where it was tuned in full
    projector/
    model.safetensors ...    the whole LLM, in Llama's layout, where it was tuned in full

Nothing there is code: XTuner knows its projector by its model_type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dianjing.config.schema import LanguageModelConfig, Recipe, VisionTowerConfig
from dianjing.errors import ExportError
from dianjing.export.files import save_weights, write_json
from dianjing.export.foreign import copy_tokenizer, read_back, require_run
from dianjing.export.formats import Options
from dianjing.export.layout import not_held, part_config, preprocessor_config
from dianjing.export.receipt import Proof, compare
from dianjing.formats.config import read_config
from dianjing.formats.xtuner import LIVE_TOWER, from_live
from dianjing.infer.generate import Conversation, LoadedModel
from dianjing.model.folders import resolve
from dianjing.model.forward import num_tower_layers
from dianjing.model.weights import trainable_state

COMPARED = "the folder, read by Dianjing as it reads XTuner's own, against the run"
LOADING = """\
It stands on two base models, which XTuner must be given:

- language model: `LANGUAGE_MODEL`
- vision tower: `VISION_TOWER`

```bash
xtuner chat LANGUAGE_MODEL --visual-encoder VISION_TOWER --llava . --prompt-template TEMPLATE --image picture.jpg
```

TEMPLATE is the chat template named above. Leave `--visual-encoder` out where the folder has its own `visual_encoder/`;
give this folder in place of the language model where it has the whole language model.
"""


def can_hold(tower: Any, projector: str, llm: Any) -> str | None:
    """Return why XTuner cannot hold a model: it knows CLIP alone."""
    return not_held("xtuner", tower, projector)


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write what the run has learned into an existing folder.

    Raises:
        ExportError: there is no run, or XTuner cannot hold what it learned.
    """
    recipe = require_run(loaded, "XTuner")
    model: Any = loaded.model
    internlm2 = _is_internlm2(recipe)
    adapted = recipe.language_model.tuning == "lora"
    if internlm2 and adapted and not recipe.language_model.lora_share_qkv:
        raise ExportError(
            "InternLM2 has one wqkv in XTuner, whose LoRA has one lora_A; this run has one each for q, k and v. Train "
            "with language_model.lora_share_qkv = true, or export the whole model (--format hf)"
        )
    learned = from_live(learned_state(model, recipe), model.config.text_config, internlm2=internlm2 and adapted)
    parts: dict[str, dict[str, Tensor]] = {"llm": {}, "visual_encoder": {}, "projector": {}}
    for name, weight in learned.items():
        part, _, rest = name.partition(".")
        parts[part][rest.replace(".default.", ".")] = weight.float().contiguous()
    _save_llm(loaded, recipe, parts["llm"], folder)
    _save_tower(loaded, recipe, parts["visual_encoder"], folder)
    _save_projector(parts["projector"], folder / "projector")


@torch.no_grad()
def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the folder, put on its bases again, answers compared with the run."""
    recipe = require_run(loaded, "XTuner")
    return Proof(cases=compare(loaded, read_back(loaded, recipe, folder), conversations), compared=COMPARED)


def learned_state(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """Return what trains, a lora_A that layers share under each of their names; and the tower whole where it is tuned.

    The tower's LoRA also stands, as zeros, on the layers behind the one that the projector reads: XTuner has it there.
    """
    state, trained = model.state_dict(), trainable_state(model)
    tuning, rank = recipe.vision_tower.tuning, recipe.vision_tower.lora_rank
    learned = {
        name: weight
        for name, weight in state.items()
        if ".lora_" in name or name in trained or (tuning == "full" and name.startswith(LIVE_TOWER))
    }
    whole: Any = model
    for number in (
        range(num_tower_layers(whole), len(whole.model.vision_tower.encoder.layers)) if tuning == "lora" else ()
    ):
        for name, module in whole.model.vision_tower.encoder.layers[number].named_modules():
            if isinstance(module, nn.Linear):
                stem = f"{LIVE_TOWER}encoder.layers.{number}.{name}"
                learned[f"{stem}.lora_A.default.weight"] = torch.zeros(rank, module.in_features)
                learned[f"{stem}.lora_B.default.weight"] = torch.zeros(module.out_features, rank)
    return learned


def _is_internlm2(recipe: Recipe) -> bool:
    return read_config(resolve(recipe.language_model.folder, "language_model")).get("model_type") == "internlm2"


def _save_llm(loaded: LoadedModel, recipe: Recipe, weights: Mapping[str, Tensor], folder: Path) -> None:
    if recipe.language_model.tuning == "lora":
        _save_adapter(weights, recipe.language_model, folder / "llm_adapter", "CAUSAL_LM")
    elif recipe.language_model.tuning == "full":
        text_config = cast(Any, loaded.model.config).text_config
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]
        save_weights(weights, folder)
        write_json(folder / "config.json", part_config(text_config, "float32") | {"architectures": [architecture]})
        copy_tokenizer(recipe, folder)


def _save_tower(loaded: LoadedModel, recipe: Recipe, weights: Mapping[str, Tensor], folder: Path) -> None:
    if recipe.vision_tower.tuning == "lora":
        _save_adapter(weights, recipe.vision_tower, folder / "visual_encoder_adapter", None)
    elif recipe.vision_tower.tuning == "full":
        out = folder / "visual_encoder"
        out.mkdir()
        save_weights(weights, out)
        config = part_config(cast(Any, loaded.model.config).vision_config, "float32")
        write_json(out / "config.json", config | {"architectures": ["CLIPVisionModel"]})
        # XTuner pads to a square by itself.
        preprocessing = preprocessor_config(replace(loaded.processor, aspect="crop"))
        del preprocessing["processor_class"], preprocessing["do_pad"]
        write_json(out / "preprocessor_config.json", preprocessing)


def _save_adapter(
    weights: Mapping[str, Tensor], config: LanguageModelConfig | VisionTowerConfig, folder: Path, task: str | None
) -> None:
    folder.mkdir()
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    lora = LoraConfig(
        base_model_name_or_path=config.folder,
        task_type=task,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=config.lora_dropout,
        inference_mode=True,
    )
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights})
    write_json(folder / "adapter_config.json", lora.to_dict() | {"target_modules": targets})


def _save_projector(weights: Mapping[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["ProjectorModel"],
            "model_type": "projector",
            "visual_hidden_size": weights["model.0.weight"].shape[1],
            "llm_hidden_size": weights["model.2.weight"].shape[0],
            "depth": 2,
            "hidden_act": "gelu",
            "bias": True,
            "torch_dtype": "float32",
        },
    )
