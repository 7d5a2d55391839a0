"""Tower, LLM and projector put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dianjing.errors import ModelError
from dianjing.model.build import assemble, build
from dianjing.model.forward import image_features
from dianjing.model.towers.families import load_tower, num_features, tower_config
from dianjing.pictures.image import ImageProcessor
from tests.conftest import MakeRecipe
from tests.tiny import NUM_IMAGE_TOKENS, write_clip, write_llm, write_siglip
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
    expected, _ = load_tower(tiny_clip, torch.float32)
    tower, report = load_tower(kind(tiny_clip, tmp_path / "tower"), torch.float32)
    assert tower.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in tower.state_dict().items())
    assert "not needed" in str(report)


def test_a_tower_of_xtuners_days_is_read() -> None:
    tower, report = load_tower(XTUNER / "tiny" / "tiny_clip", torch.float32)
    assert tower.config.hidden_size == 24
    assert "not needed" not in str(report)


def whole_siglip(tower: Path, folder: Path) -> Path:
    """Save a SigLIP with this tower in it, its text side and its scale beside it."""
    vision = SiglipVisionModel.from_pretrained(tower)
    text = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    siglip = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text))
    siglip.vision_model.load_state_dict(vision.state_dict())
    siglip.save_pretrained(folder)
    return folder


def pickled_tower(tower: Path, folder: Path) -> Path:
    """Save the tower as old repositories hold it: names with a prefix, in pytorch_model.bin."""
    folder = old_tower(tower, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("kind", [whole_siglip, old_tower, pickled_tower])
def test_a_siglip_is_read_without_its_pooling_head(tiny_siglip: Path, tmp_path: Path, kind: Any) -> None:
    stored = load_file(tiny_siglip / "model.safetensors")
    tower, report = load_tower(kind(tiny_siglip, tmp_path / "tower"), torch.float32)
    assert tower.state_dict().keys() == {name for name in stored if not name.startswith("head.")}
    assert all(torch.equal(weight, stored[name]) for name, weight in tower.state_dict().items())
    assert "SiglipVisionModel" in str(report)
    assert "not needed" in str(report)


def test_a_folder_without_a_tower_is_refused(tiny_llm: Path, tiny_siglip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match='model_type "llama" is none of the vision towers that can be read'):
        load_tower(tiny_llm, torch.float32)
    for kind in ("siglip2", "siglip2_vision_model"):
        folder = Path(shutil.copytree(tiny_siglip, tmp_path / kind))
        (folder / "config.json").write_text(json.dumps({"model_type": kind, "num_patches": 256}))
        with pytest.raises(ModelError, match="SigLIP 2 of any resolution"):
            load_tower(folder, torch.float32)


def test_a_tower_with_a_weight_missing_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = old_tower(tiny_clip, tmp_path / "tower")
    weights = load_file(folder / "model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder.layers.0.mlp.fc1.bias missing"):
        load_tower(folder, torch.float32)


def test_what_is_built_fits_together(make_recipe: MakeRecipe) -> None:
    built = build(make_recipe("pretrain"))
    assert built.encoder.picture_tokens() == NUM_IMAGE_TOKENS
    assert built.encoder.image_token_id == built.model.config.image_token_id == len(built.tokenizer)
    assert built.model.get_input_embeddings().weight.shape[0] == len(built.tokenizer)  # not resized
    assert built.model.config.text_config is built.model.model.language_model.config
    assert built.image_processor.aspect == "pad"
    assert len(built.report.lines) == 4
    assert "template: internlm2_chat (as named)" in built.report.lines


@pytest.mark.parametrize("feature_layer", [-4, -3, -2, -1, 0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "size", "patch"), [("clip", 28, 14), ("clip", 30, 8), ("siglip", 30, 8), ("siglip", 32, 8)]
)
def test_image_features_are_upstreams(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str, size: int, patch: int, feature_layer: int
) -> None:
    write = {"clip": write_clip, "siglip": write_siglip}[kind]
    folder = write(tmp_path / "tower", image_size=size, patch_size=patch)
    built = build(make_recipe("pretrain", vision_tower={"folder": str(folder), "feature_layer": feature_layer}))
    pixels = torch.randn(2, 3, size, size)
    ours, model = image_features(built.model, pixels), built.model
    expected = model.get_image_features(pixels, output_hidden_states=True).pooler_output
    torch.testing.assert_close(ours, torch.stack(list(expected)))
    assert model.config.vision_feature_select_strategy == {"clip": "default", "siglip": "full"}[kind]
    assert ours.shape[1] == built.encoder.picture_tokens() == model.config.image_seq_length == (size // patch) ** 2


def test_a_siglip_picture_is_padded_with_its_grey_and_stretched(make_recipe: MakeRecipe, tiny_siglip: Path) -> None:
    processor = build(make_recipe("pretrain", vision_tower={"folder": str(tiny_siglip)})).image_processor
    pixels = processor(Image.new("RGB", (60, 20), (255, 0, 0)))
    assert pixels[:, 0, 0].tolist() == pytest.approx([127 / 127.5 - 1] * 3, abs=1e-6)
    assert pixels[:, 15, 15].tolist() == [1.0, -1.0, -1.0]
    upstream = SiglipImageProcessorPil.from_pretrained(tiny_siglip)
    noise = Image.effect_noise((47, 19), 80).convert("RGB")
    stretched = ImageProcessor.from_folder(tiny_siglip, "crop")(noise)
    assert torch.equal(stretched, upstream(noise, return_tensors="pt")["pixel_values"][0])


def test_a_feature_layer_the_tower_has_not_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ModelError, match=r"feature_layer is -5, but the tower has 3 layers: -4 to 3"):
        build(make_recipe("pretrain", vision_tower={"feature_layer": -5}))


def test_an_llm_that_could_leak_is_refused(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, _ = load_tower(tiny_clip, torch.float32)
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


def test_a_class_token_is_counted_only_when_it_is_kept(tiny_clip: Path, tiny_siglip: Path) -> None:
    clip, siglip = (tower_config(folder) for folder in (tiny_clip, tiny_siglip))
    assert [num_features(clip, strategy, (28, 28)) for strategy in ("default", "full")] == [4, 5]
    assert [num_features(siglip, strategy, (30, 30)) for strategy in ("default", "full")] == [8, 9]
