"""Reading a text LLM: InternLM2 as Llama, and every weight accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from dianjing.errors import ModelError
from dianjing.model.language import internlm2_to_llama, load_language_model
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
            lambda w: w.update({"lm_head.weight": torch.zeros(3, 32)}), "cannot be loaded", id="of another shape"
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
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(folder, torch.float32)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin, which can run code"):
        load_language_model(folder, torch.float32)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "modeling_trap.py").write_text("raise SystemExit('ran')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Config"})
    model, _ = load_language_model(folder, torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"
    change_config(folder, model_type="trap")
    with pytest.raises(ModelError, match='model_type "trap"'):
        load_language_model(folder, torch.float32)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "a JSON object is needed, not a list")])
def test_a_config_that_is_none_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load_language_model(folder, torch.float32)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no config.json"):
        load_language_model(tmp_path, torch.float32)
