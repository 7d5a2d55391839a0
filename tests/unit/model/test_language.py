"""Reading a text LLM: InternLM2 as Llama, and every weight accounted for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from dianjing.errors import ModelError
from dianjing.formats.config import read_config
from dianjing.formats.internlm2 import internlm2_to_llama
from dianjing.model.language import load_language_model
from tests.xtuner import XTUNER

INTERNLM2 = XTUNER / "tiny" / "tiny_internlm2"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny_llm: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLM to be damaged."""
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


def change_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_is_read_with_its_weights(tiny_llm: Path, dtype: torch.dtype) -> None:
    model, report = load_language_model(tiny_llm, dtype)
    stored = load_file(tiny_llm / WEIGHTS)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in model.state_dict().items())
    assert f"LlamaForCausalLM, {sum(weight.numel() for weight in stored.values()):,} parameters" in str(report)


def test_the_rows_of_a_fused_wqkv_go_to_their_heads() -> None:
    """4 query heads, 2 key-value heads of 3 rows each: q0 q1 k0 v0 q2 q3 k1 v1."""
    config = LlamaConfig(hidden_size=12, num_attention_heads=4, num_key_value_heads=2)
    rows = {"q0": 0, "q1": 3, "k0": 6, "v0": 9, "q2": 12, "q3": 15, "k1": 18, "v1": 21}
    fused = torch.arange(24.0)[:, None].expand(24, 5)
    split = internlm2_to_llama("model.layers.7.attention.wqkv.weight", fused, config)
    for part, heads in (("q", ["q0", "q1", "q2", "q3"]), ("k", ["k0", "k1"]), ("v", ["v0", "v1"])):
        expected = [rows[head] + offset for head in heads for offset in range(3)]
        assert split[f"model.layers.7.self_attn.{part}_proj.weight"][:, 0].tolist() == expected


def test_internlm2_is_read_whole() -> None:
    model, report = load_language_model(INTERNLM2, torch.float32)
    stored = load_file(INTERNLM2 / WEIGHTS)
    assert sum(weight.numel() for weight in model.parameters()) == sum(weight.numel() for weight in stored.values())
    assert torch.equal(model.lm_head.weight, stored["output.weight"])
    assert model.config.rope_parameters["rope_theta"] == 1_000_000
    assert "InternLM2, read as Llama" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: w.pop("model.norm.weight"), "model.norm.weight missing", id="missing"),
        pytest.param(lambda w: w.update({"model.extra": torch.zeros(1)}), "model.extra left over", id="left over"),
        pytest.param(
            lambda w: w.update({"lm_head.weight": torch.zeros(3, 32)}), "of other sizes than", id="of another shape"
        ),
    ],
)
def test_weights_that_are_not_exactly_the_models_are_refused(folder: Path, change: Any, message: str) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, torch.float32)


def test_weights_of_internlm2_that_are_not_exactly_its_own_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INTERNLM2, tmp_path / "llm"))
    change_weights(folder, lambda w: w.pop("model.layers.1.attention.wqkv.weight"))
    with pytest.raises(ModelError, match=r"model.layers.1.self_attn.k_proj.weight.*missing"):
        load_language_model(folder, torch.float32)


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ModelError, match="cut short"):
        load_language_model(folder, torch.float32)


class Payload:
    """What a hostile file would have run when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def as_bin(folder: Path) -> dict[str, torch.Tensor]:
    """Keep the weights of a folder in pytorch_model.bin, and return them."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return weights


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_of_tensors_are_read(folder: Path, zipped: bool) -> None:
    weights = as_bin(folder)
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    model, _ = load_language_model(folder, torch.float32)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    torch.save({**weights, "model.extra": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.extra left over"):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize("kind", ["zip", "torch's old format", "plain pickle", "shard"])
def test_a_pickle_that_would_run_something_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    hostile = {**as_bin(folder), "model.extra": Payload(tmp_path / "ran")}
    path = folder / "pytorch_model.bin"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(hostile, protocol=4))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=kind != "torch's old format")
    if kind == "shard":
        path = path.rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"weight_map": dict.fromkeys(hostile, path.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{path.name}: refused: to be read it asks for (posix|nt)\.system"):
        load_language_model(folder, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_preferred_to_a_pickle(folder: Path, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    load_language_model(folder, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"text", "damaged, or not a file of tensors"),
        (pickle.dumps({"a": {1, 2}}), "refused: to be read it asks for something other than tensors"),
        ([torch.ones(1)], "a table of tensors"),
        ({"a": 3}, "a table of tensors"),
    ],
)
def test_a_bin_file_of_something_else_is_refused(folder: Path, content: Any, message: str) -> None:
    as_bin(folder)
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, torch.float32)


def test_an_index_leads_to_no_other_folder(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    index = folder / "model.safetensors.index.json"
    for name, message in (
        (f"../{WEIGHTS}", "is not a file of this folder"),
        (str(folder.parent / WEIGHTS), "is not a file of this folder"),
        ("gone.safetensors", "gone.safetensors not there"),
        ("x" * 300, "not there; copy the folder again"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, name)}))
        with pytest.raises(ModelError, match=message):
            load_language_model(folder, torch.float32)
    for text, message in (
        ('{"weight_map": null}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ("[" * 100_000, "index.json: not JSON"),
    ):
        index.write_text(text)
        with pytest.raises(ModelError, match=message):
            load_language_model(folder, torch.float32)
    index.unlink()
    with pytest.raises(ModelError, match="it has no weights"):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gemma3"}, r'"gemma3" is multimodal already \(transformers reads it as Gemma3For'),
        ({"model_type": "idefics3", "vision_config": {}}, r"multimodal already \(it has vision_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"weights are quantized \(gptq\)"),
    ],
)
def test_a_model_that_is_no_plain_text_llm_is_refused(folder: Path, settings: dict, message: str) -> None:
    change_config(folder, **settings)
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, torch.float32)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "modeling_trap.py").write_text("raise SystemExit('ran')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Config"})
    model, _ = load_language_model(folder, torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    change_config(folder, model_type="trap")
    with pytest.raises(ModelError, match='model_type "trap"'):
        load_language_model(folder, torch.float32)


def test_a_value_that_a_config_cannot_have_is_refused(folder: Path, tmp_path: Path) -> None:
    internlm2 = Path(shutil.copytree(INTERNLM2, tmp_path / "internlm2"))
    for broken in (folder, internlm2):
        change_config(broken, hidden_size="abc")
        with pytest.raises(ModelError, match=r"'hidden_size' expected int, got str"):
            load_language_model(broken, torch.float32)
    change_config(folder, model_type=["llama"])
    with pytest.raises(ModelError, match="is not a text LLM"):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0; at least 1 is needed"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple of num_key_value_heads, 3"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"hidden_act": "evil"}, 'hidden_act is "evil", which transformers does not know'),
    ],
)
def test_a_size_that_no_model_has_is_refused_by_name(tmp_path: Path, settings: dict, message: str) -> None:
    folder = Path(shutil.copytree(INTERNLM2, tmp_path / "llm"))
    change_config(folder, **settings)
    with pytest.raises(ModelError, match=f"config.json: {message}.*; copy it again"):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize("shape", [(), (0, 5), (7, 5)])
def test_a_wqkv_of_other_heads_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "model.layers.1.attention.wqkv.weight"
    with pytest.raises(ModelError, match=f"{name} has . rows, which 4 query and 2 key-value heads.*of another LLM"):
        internlm2_to_llama(name, torch.zeros(shape), LlamaConfig(num_attention_heads=4, num_key_value_heads=2))
    folder = Path(shutil.copytree(INTERNLM2, tmp_path / "llm"))
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))
    with pytest.raises(ModelError, match=rf"{folder}: the weights are not those of its config.json: {name}"):
        load_language_model(folder, torch.float32)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    weights = as_bin(folder)
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    torch.save(weights, folder / names[0])
    torch.save({"model.norm.weight": torch.zeros(32)}, folder / names[1])
    (folder / "pytorch_model.bin").unlink()
    index = {"weight_map": dict.fromkeys(weights, names[0]) | {"model.norm.weight": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{names[1]}: model.norm.weight is also in {names[0]}"):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize("part", [None, "vision_config"])
def test_a_model_of_a_million_layers_is_not_built(folder: Path, part: str | None) -> None:
    layers = {"num_hidden_layers": 1_000_000}
    change_config(folder, **({part: layers} if part else layers))
    with pytest.raises(ModelError, match="num_hidden_layers is 1000000; no model has over 1000"):
        read_config(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "a JSON object is needed, not a list")]
)
def test_a_config_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, torch.float32)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config.json"):
        load_language_model(tmp_path, torch.float32)
