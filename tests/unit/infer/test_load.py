from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from dianjing.config.schema import Recipe
from dianjing.data.encode import load_tokenizer
from dianjing.errors import CheckpointError, ModelError
from dianjing.infer.generate import generate_ids
from dianjing.infer.load import load_for_use
from dianjing.train.loop import train
from tests.chat_templates import RUNS
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model, loaded_text_model, write_run
from tests.tiny import write_clip

TOKENS = 12


@pytest.mark.parametrize(
    ("stage", "sections"),
    [
        ("pretrain", {}),
        ("finetune", {"language_model": {"tuning": "lora", "template": ""}, "vision_tower": {"tuning": "lora"}}),
        ("finetune", {"language_model": {"tuning": "full"}}),
    ],
)
def test_a_run_answers_as_it_was_left(make_recipe: MakeRecipe, stage: str, sections: dict) -> None:
    recipe = make_recipe(stage, projector={"init_from": "a/run/that/is/gone"}, **sections)
    trained = loaded_model(make_recipe(stage, **sections))
    run = write_run(recipe, trained)
    loaded = load_for_use(str(run), "cpu")
    assert loaded.can_see
    assert loaded.name == str(run)
    assert generate_ids(loaded, conversations(), TOKENS) == generate_ids(trained, conversations(), TOKENS)


def test_a_run_on_other_bases_than_it_was_trained_on_is_said(
    make_recipe: MakeRecipe, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = shutil.copytree(tiny_clip, tmp_path / "tower")
    run = train(make_recipe(vision_tower={"folder": str(tower)}, train={"max_steps": 1}), quiet=True)
    capsys.readouterr()
    load_for_use(str(run), "cpu")
    assert "warning" not in capsys.readouterr().err
    write_clip(tower, seed=9)
    load_for_use(str(run), "cpu")
    assert "not what the run was trained on: the vision tower" in capsys.readouterr().err


def test_a_text_llm_has_no_eyes(tiny_llm: Path) -> None:
    loaded = load_for_use(str(tiny_llm), "cpu")
    assert not loaded.can_see
    assert loaded.encoder.template.name == "internlm2_chat"
    asked = conversations()
    assert generate_ids(loaded, asked, TOKENS) == generate_ids(loaded_text_model(tiny_llm), asked, TOKENS)


LAYOUTS = {
    "hub": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "live in transformers 4": {"model.vision_tower.": "model.vision_tower.vision_model.", "": ""},
    "live in transformers 5": {"": ""},
    "saved by transformers 5": {},
}
"""How live names are written in the files that are around; nothing: as transformers writes them."""


def hub_llava(folder: Path, recipe: Recipe, *, layout: str, pickled: bool, template: str | None) -> list[list[int]]:
    """Save a LLaVA as the hub holds it, and return its answers."""
    loaded = loaded_model(recipe)
    answers = generate_ids(loaded, conversations(), TOKENS)
    model: Any = loaded.model
    tokenizer = load_tokenizer(recipe.language_model.folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    bos = str(tokenizer.bos_token), tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer.save_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    model.config.text_config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    shutil.copy(Path(recipe.vision_tower.folder) / "preprocessor_config.json", folder)
    if renames := LAYOUTS[layout]:
        weights = {}
        for live, weight in model.state_dict().items():
            begin, written = next((one, other) for one, other in renames.items() if live.startswith(one))
            weights[written + live.removeprefix(begin)] = weight.clone()
    else:
        weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return answers


CHAT = "".join(
    (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}<image>\n",
        "{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}",
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
)
"""A chat template for texts and pictures, as LLaVAs on the hub have them; no BOS, which the tokenizer adds."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_llava_of_the_hub_answers(
    make_recipe: MakeRecipe,
    tiny_clip: Path,
    tiny_siglip: Path,
    tmp_path: Path,
    tower: str,
    pickled: bool,
    layout: str,
) -> None:
    folder = {"clip": tiny_clip, "siglip": tiny_siglip}[tower]
    recipe = make_recipe("finetune", language_model={"tuning": "full"}, vision_tower={"folder": str(folder)})
    answers = hub_llava(tmp_path / "llava", recipe, layout=layout, pickled=pickled, template=CHAT)
    loaded = load_for_use(str(tmp_path / "llava"), "cpu")
    assert loaded.can_see
    assert loaded.encoder.template.name == "internlm2_chat"
    assert loaded.encoder.picture_tokens() == {"clip": 4, "siglip": 9}[tower]
    assert generate_ids(loaded, conversations(), TOKENS) == answers


def test_a_hostile_llava_runs_nothing(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = make_recipe("finetune", language_model={"tuning": "full"})
    hub_llava(tmp_path / "llava", recipe, layout="hub", pickled=False, template=RUNS)
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "trap.Trap", "AutoConfig": "trap.Trap", "AutoTokenizer": ["trap.Trap", None]}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    (tmp_path / "llava" / "trap.py").write_text("raise SystemExit('code of a model folder was run')")
    before = set(tmp_path.rglob("*"))
    loaded = load_for_use(str(tmp_path / "llava"), "cpu")
    assert loaded.encoder.template.name == "internlm2_chat"
    assert generate_ids(loaded, conversations(), 2)
    assert set(tmp_path.rglob("*")) == before


def test_what_is_no_model_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; give a run"):
        load_for_use(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"neither recipe\.toml"):
        load_for_use(str(tmp_path))
    other = {"model_type": "llava", "vision_config": {"model_type": "pixtral"}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ModelError, match=r'its vision tower.*"pixtral" is none of the vision towers'):
        load_for_use(str(tmp_path))
    layers = {"vision_config": {"model_type": "clip_vision_model"}, "vision_feature_layer": [-2, -5]}
    (tmp_path / "config.json").write_text(json.dumps(other | layers))
    with pytest.raises(ModelError, match="features of several layers"):
        load_for_use(str(tmp_path))


def test_a_run_without_a_whole_checkpoint_is_refused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("pretrain")
    run = write_run(recipe, loaded_model(recipe))
    weights = next(run.glob("checkpoints/*/trainable.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        load_for_use(str(run))
