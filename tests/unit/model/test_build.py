"""Tower, LLM and projector put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from dianjing.errors import ModelError
from dianjing.model.build import assemble, build, num_image_tokens
from dianjing.model.forward import image_features
from dianjing.model.vision import load_vision_tower
from tests.conftest import MakeRecipe
from tests.tiny import NUM_IMAGE_TOKENS, write_llm
from tests.xtuner import XTUNER


def whole_clip(tower: Path, folder: Path) -> Path:
    """Save a CLIP with this tower in it."""
    vision = CLIPVisionModel.from_pretrained(tower)
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(vision_config=vision.config.to_dict(), text_config={**text, **ids})
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(vision.state_dict())
    clip.save_pretrained(folder)
    return folder


def old_tower(tower: Path, folder: Path) -> Path:
    """Save the tower as transformers 4 did: names with a prefix, and the row numbers of the positions."""
    shutil.copytree(tower, folder)
    weights = {f"vision_model.{name}": weight for name, weight in load_file(tower / "model.safetensors").items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", [whole_clip, old_tower])
def test_a_tower_is_read_from_a_whole_clip_and_from_an_old_file(tiny_clip: Path, tmp_path: Path, kind: Any) -> None:
    expected, _ = load_vision_tower(tiny_clip, torch.float32)
    tower, report = load_vision_tower(kind(tiny_clip, tmp_path / "tower"), torch.float32)
    assert tower.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in tower.state_dict().items())
    assert "not needed" in str(report)


def test_a_tower_of_xtuners_days_is_read() -> None:
    tower, report = load_vision_tower(XTUNER / "tiny" / "tiny_clip", torch.float32)
    assert tower.config.hidden_size == 24
    assert "not needed" not in str(report)


def test_a_folder_without_a_clip_is_refused(tiny_llm: Path) -> None:
    with pytest.raises(ModelError, match='model_type "llama" is no CLIP'):
        load_vision_tower(tiny_llm, torch.float32)


def test_a_tower_with_a_weight_missing_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = old_tower(tiny_clip, tmp_path / "tower")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder.layers.0.mlp.fc1.bias missing"):
        load_vision_tower(folder, torch.float32)


def test_what_is_built_fits_together(make_recipe: MakeRecipe) -> None:
    built = build(make_recipe("pretrain"))
    assert built.encoder.num_image_tokens == NUM_IMAGE_TOKENS
    assert built.encoder.image_token_id == built.model.config.image_token_id == len(built.tokenizer)
    assert built.model.get_input_embeddings().weight.shape[0] == len(built.tokenizer)  # not resized
    assert built.model.config.text_config is built.model.model.language_model.config
    assert built.image_processor.aspect == "pad"
    assert len(built.report.lines) == 3


@pytest.mark.parametrize("feature_layer", [-4, -3, -2, -1, 1, 3])
def test_image_features_are_upstreams(make_recipe: MakeRecipe, feature_layer: int) -> None:
    model = build(make_recipe("pretrain", vision_tower={"feature_layer": feature_layer})).model
    pixels = torch.randn(2, 3, 28, 28)
    expected = model.get_image_features(pixels, vision_feature_layer=feature_layer).pooler_output
    torch.testing.assert_close(image_features(model, pixels), torch.stack(list(expected)))


def test_a_feature_layer_the_tower_has_not_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ModelError, match=r"feature_layer is -5, but the tower has 3 layers: -4 to 3"):
        build(make_recipe("pretrain", vision_tower={"feature_layer": -5}))


def test_an_llm_that_could_leak_is_refused(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, _ = load_vision_tower(tiny_clip, torch.float32)
    llm = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=1, eos_token_id=1))
    monkeypatch.setattr(GPT2LMHeadModel, "_supports_attention_backend", False)
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not supported"):
        assemble(llm, tower, 9, -2, 0)


def test_a_tokenizer_larger_than_the_llm_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = write_llm(tmp_path, vocab_size=319)
    with pytest.raises(ModelError, match="ids go up to 319, but the LLM has 319 embeddings"):
        build(make_recipe("pretrain", language_model={"folder": str(folder)}))


def test_preprocessing_of_another_tower_is_refused(make_recipe: MakeRecipe, tiny_clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_clip, tmp_path / "clip"))
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"crop_size": 14, "size": 14}))
    with pytest.raises(ModelError, match=r"pictures of 28 pixels, but preprocessor_config.json makes them 14"):
        build(make_recipe("pretrain", vision_tower={"folder": str(folder)}))


def test_a_class_token_is_counted_only_when_it_is_kept(tiny_clip: Path) -> None:
    config = CLIPVisionModel.from_pretrained(tiny_clip).config
    assert (num_image_tokens(config, "default"), num_image_tokens(config, "full")) == (4, 5)
