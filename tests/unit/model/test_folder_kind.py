"""Folders that people name where one of a model is needed: each is called what it is, before any weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dianjing.data.encode import load_tokenizer, text_ids
from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.weights import weight_files
from dianjing.model.build import build
from dianjing.model.folders import base_folders, resolve
from dianjing.model.weights import load_projector
from tests.conftest import MakeRecipe

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/llm"}')


def gguf(folder: Path) -> None:
    (folder / "x.gguf").write_bytes(b"GGUF")


def cache(folder: Path) -> None:
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/config.json").write_text("{}")


def above(folder: Path) -> None:
    (folder / "llm").mkdir()
    (folder / "llm/config.json").write_text("{}")


def open_clip(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("{}")


def with_config(**fields: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(fields))


def pointer(folder: Path) -> None:
    (folder / "config.json").write_text(POINTER)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (adapter, r"a LoRA adapter of org/llm, not a model; give the folder of the base model"),
        (gguf, r"it holds GGUF files; make a folder of one: dianjing import .*x\.gguf models/x"),
        (cache, r"a folder of the hub's cache; give .*snapshots/abc"),
        (above, r"no config\.json in it, but in folders within it; give one of them: .*/llm"),
        (open_clip, r"a model of open_clip"),
        (with_config(architecture="eva02", pretrained_cfg={}), r"a model of timm \(eva02\)"),
        (with_config(hidden_size=8), r"config\.json has no model_type"),
        (pointer, r"git-lfs pointers, not the files themselves; fetch them with `git lfs pull`"),
    ],
)
def test_a_folder_is_called_what_it_is(
    write: Callable[[Path], object], words: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    for part in ("language_model", "vision_tower"):
        with pytest.raises(ModelError, match=words):
            base_folders(make_recipe(**{part: {"folder": str(folder)}}))


@pytest.mark.parametrize("model_type", ["llava_qwen", "tinyllava", "llava_llama"])
def test_a_llava_is_not_a_part_of_one(model_type: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with_config(model_type=model_type, mm_vision_tower="org/clip")(tmp_path)
    for part in ("language_model", "vision_tower"):
        with pytest.raises(ModelError, match=r"has eyes already .*its tower: org/clip"):
            base_folders(make_recipe(**{part: {"folder": str(tmp_path)}}))


def test_a_file_of_weights_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="a file of weights, where a folder is needed"):
        resolve(str(tmp_path / "model.safetensors"), "language_model")


def test_weights_that_are_not_whole(tmp_path: Path, tiny_llm: Path) -> None:
    whole = (tiny_llm / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    for content, words in (
        (POINTER.encode(), "a git-lfs pointer, not the weights"),
        (whole[:-5], r"cut short \([\d,]+ of [\d,]+ bytes\); download it again"),
        (whole[:4], "cut short"),
        (b"<!doctype html>" * 9, "a web page"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            weight_files(tmp_path)
    path.write_bytes(whole)
    assert weight_files(tmp_path) == [path]
    path.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"1 shards are there .* but not their index, model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pad_token_id": 320, "vocab_size": 320}, "pad_token_id is 320, beyond the 320 tokens"),
        (
            {"model_type": "deepseek_v3", "num_attention_heads": 8, "num_key_value_heads": 4},
            "num_key_value_heads is 4, where this architecture has as many as heads, 8",
        ),
    ],
)
def test_a_config_that_no_model_can_have(fields: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=words):
        read_config(tmp_path)


def test_a_tokenizer_of_vocab_and_merges(tmp_path: Path, tiny_llm: Path) -> None:
    backend = json.loads((tiny_llm / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in backend["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(backend["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    text = "What colour is the bus?"
    assert text_ids(load_tokenizer(tmp_path), text) == text_ids(load_tokenizer(tiny_llm), text)


def test_the_tower_is_looked_at_before_the_llm_is_read(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = shutil.copytree(tiny_clip, tmp_path / "clip")
    (tower / "preprocessor_config.json").unlink()
    monkeypatch.setattr("dianjing.model.build.load_language_model", lambda *_: pytest.fail("the LLM was read"))
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        build(make_recipe(vision_tower={"folder": str(tower)}))


@pytest.mark.parametrize("beginning", ["multi_modal_projector.", "model.multi_modal_projector."])
def test_the_projector_of_a_llava_of_the_hub(make_recipe: MakeRecipe, tmp_path: Path, beginning: str) -> None:
    model = build(make_recipe()).model
    projector = model.model.multi_modal_projector
    wanted = {name: torch.randn_like(weight) for name, weight in projector.state_dict().items()}
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {}, "vision_config": {}}')
    others = {"language_model.lm_head.weight": torch.zeros(2, 2)}
    save_file(
        {f"{beginning}{name}": weight for name, weight in wanted.items()} | others, tmp_path / "model.safetensors"
    )
    assert load_projector(model, tmp_path) == tmp_path
    assert all(torch.equal(weight, wanted[name]) for name, weight in projector.state_dict().items())


def test_the_projector_of_an_adapter_export(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = build(make_recipe()).model
    projector = model.model.multi_modal_projector
    save_file({name: weight + 1 for name, weight in projector.state_dict().items()}, tmp_path / "projector.safetensors")
    (tmp_path / "recipe.toml").write_text("")
    load_projector(model, tmp_path)
    written = load_file(tmp_path / "projector.safetensors")
    assert all(torch.equal(weight, written[name]) for name, weight in projector.state_dict().items())
