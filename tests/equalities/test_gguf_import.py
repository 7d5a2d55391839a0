"""The folder made of a GGUF file is the model that transformers reads from it: the same ids, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dianjing[gguf]'")
from gguf import GGUFReader, dequantize

from dianjing.data.encode import load_tokenizer
from dianjing.data.template import template_for
from dianjing.importing.gguf import RECEIPT, ROUNDED, import_gguf
from dianjing.model.language import load_language_model
from tests.gguf_files import LAYERS, write_gguf_llm

TEXTS = ("the hat in the sun", "  Two blanks, 12 and\n\nlines", "图 😀", "<|im_start|>user\nthat<|im_end|>")
PLACES = [(architecture, kind) for architecture in ("llama", "qwen2", "gemma3") for kind in ("F16", "Q8_0", "Q4_K")]


def read_by_transformers(path: Path) -> tuple[Any, Any]:
    place: Any = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    packed = getattr(transformers, "GgufConfig", None)
    more = {"quantization_config": packed(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **more)
    return model.eval(), AutoTokenizer.from_pretrained(**place)


@pytest.mark.parametrize(("architecture", "kind"), PLACES)
def test_ids_and_logits_are_those_of_the_file(tmp_path: Path, architecture: str, kind: str) -> None:
    path = write_gguf_llm(tmp_path / "model.gguf", architecture, kind)
    lines = import_gguf(path, tmp_path / "out" / "llm")
    model, tokenizer = read_by_transformers(path)
    own, _ = load_language_model(tmp_path / "out" / "llm", torch.float32)
    own_tokenizer = load_tokenizer(tmp_path / "out" / "llm")
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert own_tokenizer.encode(text, add_special_tokens=False) == ids
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits
            assert torch.equal(own(input_ids=torch.tensor([ids])).logits, expected)
    assert own_tokenizer.chat_template == tokenizer.chat_template
    if architecture != "gemma3":  # which does not have the marks of the template in the file
        assert "<|im_start|>assistant" in template_for(own_tokenizer, "")[0].instruction
    (up,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    weights = torch.from_numpy(dequantize(up.data, up.tensor_type).copy())
    assert torch.equal(own.get_decoder().layers[1].mlp.up_proj.weight, weights)

    receipt = json.loads((tmp_path / "out" / "llm" / RECEIPT).read_text(encoding="utf-8"))
    assert receipt["architecture"] == architecture
    assert receipt["tensors_by_type"][kind] == 7 * LAYERS + (1 if architecture == "gemma3" else 2)
    assert (receipt["note"] == ROUNDED) == (ROUNDED in lines) == (kind != "F16")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["llm"]


def test_llama_3_keeps_its_rotary_factors(tmp_path: Path) -> None:
    """transformers leaves them unread; the folder has the settings that give them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters={**rope, "original_max_position_embeddings": 8192}
    )
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = 5e5 ** -(torch.arange(0, 64, 2) / 64) / wanted
    path = write_gguf_llm(tmp_path / "a.gguf", factors=factors.numpy(), **{"llama.rope.freq_base": 5e5})
    import_gguf(path, tmp_path / "llm")
    own, _ = load_language_model(tmp_path / "llm", torch.float32)
    assert torch.allclose(own.get_decoder().rotary_emb.inv_freq, wanted, rtol=1e-5)
