"""A GGUF pair answers as its run does: read back by transformers, and by llama.cpp itself where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dianjing.errors import ExportError
from dianjing.export.export import export
from dianjing.export.formats import Options
from dianjing.infer.generate import LoadedModel
from tests.conftest import MakeRecipe
from tests.loaded_models import conversations, loaded_model, loaded_text_model
from tests.tiny import write_clip, write_siglip, write_tokenizer

pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dianjing[gguf]'")
from dianjing.export.gguf import file, llama, text, write
from dianjing.export.gguf import format as module
from dianjing.export.gguf.file import read_keys, read_tensors, read_types
from dianjing.export.gguf.text import TEXT_FILE
from dianjing.export.gguf.vision import VISION_FILE

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama, other heads": (
        LlamaConfig,
        LlamaForCausalLM,
        {"head_dim": 16, "num_key_value_heads": 1, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama, llama3": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 500}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 8}),
}


def write_family(folder: Path, family: str) -> Path:
    """Save a random LLM of a family; norms and biases are moved away from one and zero, so that each one counts."""
    config_class, model_class, settings = FAMILIES[family]
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_theta": 5e4, **settings.pop("rope_parameters", {"rope_type": "default"})}
    config = config_class(
        **sizes,
        **{"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": len(tokenizer), **settings},
        rope_parameters=rope,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    settings["rope_parameters"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_loaded(make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., LoadedModel]:
    """Return a maker of loaded models: make_loaded("qwen2", tower="siglip", aspect="crop")."""

    def make(family: str = "llama", tower: str = "siglip", aspect: str = "pad", **settings: Any) -> LoadedModel:
        llm = write_family(tmp_path / family, family)
        write: Any = write_siglip if tower == "siglip" else write_clip
        vision = write(tmp_path / tower, **settings)
        return loaded_model(
            make_recipe(
                "finetune",
                language_model={"folder": str(llm), "tuning": "lora"},
                vision_tower={"folder": str(vision), "tuning": "lora"},
                data={"aspect": aspect},
            )
        )

    return make


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma"])
def test_transformers_reads_what_was_written(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, family: str
) -> None:
    """In F32 every tensor comes back bit for bit, and the logits to rounding."""
    loaded = make_loaded(family)
    proof = export(loaded, tmp_path / "out", conversations(), "gguf", Options(quantize="f32"))
    assert len(proof.cases) == 11
    for case in proof.cases:
        assert case.equal
        assert case.same_ids
        assert case.same_answer
        assert case.logit_difference < (2e-2 if case.image_sizes else 1e-4)
        assert case.rounding_difference == case.logit_difference
    assert "F32 0" in proof.notes[0]
    keys, tensors = read_keys(tmp_path / "out" / TEXT_FILE), read_tensors(tmp_path / "out" / TEXT_FILE)
    assert keys["general.architecture"] == {"mistral": "llama"}.get(family, family.partition(",")[0])
    assert len(keys["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"])
    assert ("output.weight" in tensors) == ("tied" not in family)
    assert keys[f"{keys['general.architecture']}.context_length"] == (500 if family == "mistral" else 512)


@pytest.mark.parametrize(("kind", "tower"), [("f16", "clip"), ("bf16", "siglip"), ("q8_0", "siglip"), ("q4_0", "clip")])
def test_rounding_is_told_and_nothing_else_differs(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, kind: str, tower: str
) -> None:
    """With the run's own weights in their places, what was read computes what the run does."""
    proof = export(make_loaded(tower=tower), tmp_path / "out", conversations(), "gguf", Options(quantize=kind))
    for case in proof.cases:
        assert case.equal
        assert case.rounding_difference is not None
        assert case.rounding_difference > case.logit_difference
        assert case.logit_difference < (2e-2 if case.image_sizes else 1e-4)
    types = {name: stored.name.lower() for name, stored in read_types(tmp_path / "out" / TEXT_FILE).items()}
    assert types["blk.0.attn_q.weight"] == kind
    assert types["blk.0.ffn_down.weight"] == (kind if kind in ("f16", "bf16") else "f16")  # 48 is no whole block
    assert types["token_embd.weight"] == (kind if kind in ("f16", "bf16") else "q8_0")
    assert types["output_norm.weight"] == "f32"
    vision = {name: stored.name for name, stored in read_types(tmp_path / "out" / VISION_FILE).items()}
    assert {name for name, stored in vision.items() if stored == "F16"} == {
        name for name in vision if name.endswith("weight") and not any(x in name for x in ("ln", "position_embd"))
    }
    assert not any("post_ln" in name or "v.blk.2" in name for name in vision)


@needs_llama
@pytest.mark.parametrize("family", ["llama", "llama, llama3", "qwen2", "qwen3"])
def test_llama_cpp_answers_as_the_run_does(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, family: str
) -> None:
    loaded = make_loaded(family)
    proof = export(loaded, tmp_path / "out", conversations(), "gguf", Options(quantize="f32", verify=True))
    cases = proof.cases[:11]
    assert len(proof.cases) == 22
    for case in cases:
        assert case.same_ids
        assert case.same_answer is not False
        assert case.logit_difference < (1e-2 * max(1.0, case.largest_logit) if case.image_sizes else 1e-3)
    # Two tokens of a random model can be as good as equal.
    assert sum(bool(case.rounded_same_answer) for case in cases) >= 10
    assert any("prepared by llama.cpp" in note for note in proof.notes)


@needs_llama
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_llama_cpp_reads_rounded_weights(make_loaded: Callable[..., LoadedModel], tmp_path: Path, kind: str) -> None:
    proof = export(make_loaded(), tmp_path / "out", conversations(), "gguf", Options(quantize=kind, verify=True))
    assert all(case.same_ids for case in proof.cases)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == ["", ".gguf", ".gguf", ".json", ".md"]


@needs_llama
def test_wrong_features_of_a_clip_are_seen(make_loaded: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """llama-cpp-python 0.3.36 puts the class token last; with a version that does not, this test has done its work."""
    with pytest.raises(ExportError, match="25814"):
        export(make_loaded(tower="clip"), tmp_path / "out", [], "gguf", Options(quantize="f32", verify=True))
    assert not (tmp_path / "out").exists()


@needs_llama
def test_a_file_that_llama_cpp_cannot_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="cannot use the files"):
        llama.ask_llama(tmp_path / "text.gguf", tmp_path / "mmproj.gguf", [])


def unpermuted(tensor: Tensor, name: str, config: Any) -> Tensor:
    return tensor


def other_epsilon(config: Any) -> Any:
    keys = TEXT_KEYS(config)
    return keys | {"llama.attention.layer_norm_rms_epsilon": 1e-2}


def one_layer_less(config: Any, processor: Any) -> Any:
    keys = VISION_KEYS(config, processor)
    return keys | {"clip.vision.feature_layer": [keys["clip.vision.block_count"] - 1]}


TEXT_KEYS, VISION_KEYS = write.text_keys, write.vision_keys


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ((text, "_permuted", unpermuted), "read back with an error"),
        ((write, "text_keys", other_epsilon), "does not equal the run"),
        ((write, "vision_keys", one_layer_less), "does not equal the run"),
    ],
)
def test_a_fault_of_ours_is_seen(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, said: str
) -> None:
    loaded = make_loaded()
    monkeypatch.setattr(*fault)
    with pytest.raises(ExportError, match=said):
        export(loaded, tmp_path / "out", conversations(), "gguf", Options(quantize="f32"))
    assert not list(tmp_path.glob("out*"))


def test_numbers_too_large_for_f16_are_seen(make_loaded: Callable[..., LoadedModel], tmp_path: Path) -> None:
    loaded = make_loaded()
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[3, 3] = 1e5
    with pytest.raises(ExportError, match=r"lm_head.*--quantize f32"):
        export(loaded, tmp_path / "out", [], "gguf")


@pytest.mark.parametrize(
    ("settings", "options", "word"),
    [
        ({"family": "gemma"}, {}, "gemma"),
        ({}, {"dtype": "bf16"}, "--quantize"),
        ({}, {"quantize": "q9"}, "q4_k_m"),
        ({"intermediate_size": 24}, {}, "as wide as the tower"),
        ({"hidden_act": "relu"}, {}, "relu"),
    ],
)
def test_what_cannot_be_written_is_refused(
    make_loaded: Callable[..., LoadedModel],
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    word: str,
) -> None:
    with pytest.raises(ExportError, match=word):
        export(make_loaded(**settings), tmp_path / "out", [], "gguf", Options(**options))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda config: setattr(config.text_config, "hidden_act", "gelu"), "silu"),
        (lambda config: config.text_config.rope_parameters.update(rope_type="yarn"), "yarn"),
        (lambda config: setattr(config, "vision_feature_select_strategy", "default"), "vision_feature_select_strategy"),
        (lambda config: setattr(config, "projector_hidden_act", "relu"), "projector"),
        (lambda config: setattr(config, "vision_feature_layer", [-2, -1]), "several layers"),
        (lambda config: setattr(config, "vision_feature_layer", 0), "first layer"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, change: Callable[[Any], Any], word: str
) -> None:
    loaded = make_loaded()
    change(loaded.model.config)
    with pytest.raises(ExportError, match=word):
        module.save(loaded, tmp_path, Options())


def test_a_bias_that_llama_has_no_place_for_is_refused() -> None:
    assert text.text_name("model.language_model.layers.0.self_attn.q_proj.bias", "qwen2") == "blk.0.attn_q.bias"
    for live, kind in (
        ("model.language_model.layers.0.self_attn.q_proj.bias", "llama"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "qwen2"),
        ("model.language_model.layers.0.mlp.experts.0.weight", "llama"),
    ):
        with pytest.raises(ExportError, match="no place"):
            text.text_name(live, kind)


def test_a_text_only_model_is_refused(tiny_llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="text-only"):
        export(loaded_text_model(tiny_llm), tmp_path / "out", [], "gguf")


def test_without_llama_cpp_it_is_said_before_anything_is_written(
    make_loaded: Callable[..., LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    for options in (Options(verify=True), Options(quantize="q4_k_m")):
        with pytest.raises(ExportError, match="pip install llama-cpp-python"):
            module.save(make_loaded(), tmp_path, options)
    assert not list(tmp_path.glob("*.gguf"))


def test_how_pictures_are_prepared_is_noted(make_loaded: Callable[..., LoadedModel], tmp_path: Path) -> None:
    grey = export(make_loaded(), tmp_path / "grey", [], "gguf").notes
    assert any("(127, 127, 127)" in note and "(122, 116, 104)" in note for note in grey)
    assert not any("25814" in note for note in grey)
    padded = export(make_loaded(tower="clip"), tmp_path / "padded", [], "gguf").notes
    assert any("25814" in note for note in padded)
    assert not any("not square" in note for note in padded)
    cropped = export(make_loaded(tower="clip", aspect="crop"), tmp_path / "cropped", [], "gguf").notes
    assert any("cut to its middle" in note for note in cropped)


def test_rounding_of_tensors() -> None:
    tensor = torch.randn(4, 64)
    assert file.rounding(tensor, tensor) == 0
    assert file.rounding(tensor[:2], tensor) == float("inf")
    assert file.rounding(torch.zeros(4, 64), tensor) == pytest.approx(1)
    assert not file.rounding(tensor / 0, tensor) <= 1
    assert file.stored_type(torch.zeros(64), file.TYPES["q8_0"]).name == "F32"
    assert file.stored_type(torch.zeros(64, 31), file.TYPES["q8_0"]).name == "F16"
