"""Each family of LLM with each kind of tower: a pack is its records one by one, and what upstream computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from dianjing.data.collate import Batch
from dianjing.errors import ModelError
from dianjing.layers.attention import packed_attention
from dianjing.model.build import assemble, build, prove_isolation
from dianjing.model.language import load_language_model
from dianjing.model.towers.families import load_tower
from tests.conftest import MakeRecipe
from tests.llm_families import FAMILIES, write_family
from tests.packs import assert_same, outcome, prepare, upstream
from tests.tiny import write_llm

SIZES = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("family", [*FAMILIES, "internlm2", "internlm2.5"])
def test_a_pack_is_its_records_and_what_upstream_computes(
    make_recipe: MakeRecipe, tiny_clip: Path, tiny_siglip: Path, tmp_path: Path, family: str, tower: str
) -> None:
    parts: dict[str, Any] = {
        "language_model": {"folder": str(write_family(tmp_path / "llm", family)), "tuning": "lora"},
        "vision_tower": {"folder": str({"clip": tiny_clip, "siglip": tiny_siglip}[tower]), "tuning": "full"},
    }
    model, dataset = prepare(make_recipe("finetune", **parts))
    everything = range(dataset.num_records)
    batch: Batch = dataset.batch(everything)
    packed = outcome(model, [batch])
    assert_same(packed, outcome(model, [dataset.batch([index]) for index in everything]), rounding=20)
    assert_same(packed, upstream(model, batch), rounding=20)
    assert all(gradient.any() for name, gradient in packed[1].items() if "lora_B" in name or "projector" in name)


@pytest.mark.parametrize("family", ["internlm2", "internlm2.5"])
def test_internlm2_as_shipped_is_the_llama_it_was_made_of(tmp_path: Path, family: str) -> None:
    expected = load_file(write_llm(tmp_path / "llama", initializer_range=0.1) / "model.safetensors")
    model, report = load_language_model(write_family(tmp_path / "internlm2", family), torch.float32)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert "InternLM2, read as Llama" in str(report)
    rope = {"rope_type": "default"} if family == "internlm2" else {"rope_type": "dynamic", "factor": 2.0}
    assert model.config.rope_parameters.items() >= (rope | {"rope_theta": 1_000_000}).items()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"model_type": "gemma2", "head_dim": 8}, "it caps its logits", id="softcap"),
        pytest.param({"model_type": "cohere"}, "changes what its output head", id="head"),
        pytest.param({"model_type": "mamba"}, "by attention only", id="state"),
        pytest.param({"model_type": "nemotron", "num_key_value_heads": 2}, "the one before it", id="own attention"),
        pytest.param({"model_type": "bert"}, "by attention only", id="two-sided"),
    ],
)
def test_an_llm_that_no_pack_can_train_is_refused(tiny_clip: Path, settings: dict[str, Any], reason: str) -> None:
    tower, _ = load_tower(tiny_clip, torch.float32)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **settings)).eval()

    def check() -> None:
        assemble(llm, tower, 20, -2, 0)
        prove_isolation(llm)

    with pytest.raises(ModelError, match=f"{type(llm).__name__} is not supported: .*{reason}"):
        check()


def test_a_leak_is_seen(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_document(*arguments: Any, cu_seqlens: Any = None, **settings: Any) -> Any:
        ends = None if cu_seqlens is None else cu_seqlens[[0, -1]]
        return packed_attention(*arguments, cu_seqlens=ends, **settings)

    monkeypatch.setitem(AttentionInterface._global_mapping, "dianjing_packed", one_document)
    with pytest.raises(ModelError, match="LlamaForCausalLM is not supported: a record is changed by the one before it"):
        build(make_recipe("pretrain"))


def test_positions_that_depend_on_the_longest_record_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    folder = write_llm(tmp_path, max_position_embeddings=40, rope_scaling=scaling)
    model, dataset = prepare(make_recipe("pretrain", language_model={"folder": str(folder)}))
    outcome(model, [dataset.batch([2])])
    with pytest.raises(ModelError, match=r"beyond 40 this LLM's positions \(dynamic\) would change"):
        outcome(model, [dataset.batch(range(4))])
