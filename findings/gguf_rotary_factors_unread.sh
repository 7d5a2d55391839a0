#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: a GGUF file of Llama 3.1 or later loads without its rotary scaling.
#
# Seen: llama.cpp's converter writes Llama 3's rotary scaling ("rope_type": "llama3") as a tensor, rope_freqs.weight, by
# which each frequency is divided. from_pretrained(gguf_file=...) does not read that tensor: the model's inv_freq is that of
# a file without it, and the config has the default rope type. Nothing is said. Short prompts hardly differ; positions
# far apart do.
# What follows for Dianjing: `dianjing import FILE.gguf` turns the tensor back into the settings that give it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

print("transformers", transformers.__version__)
WIDTH, INNER, HEADS, SIZE, WORDS = 64, 96, 2, 32, 40
scaled = LlamaConfig(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    max_position_embeddings=131072,
    rope_parameters={
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
plain = 500000.0 ** -(torch.arange(0, SIZE, 2) / SIZE)


def write(path, factors):
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(SIZE)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{number}" for number in range(WORDS)])
    writer.add_token_merges(["w 0"])
    writer.add_token_types([1] * WORDS)
    shapes = {
        "token_embd.weight": (WORDS, WIDTH), "output.weight": (WORDS, WIDTH), "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,), "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (WIDTH, WIDTH), "blk.0.attn_k.weight": (WIDTH, WIDTH),
        "blk.0.attn_v.weight": (WIDTH, WIDTH), "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH), "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def frequencies(name, factors):
    write(f"{sys.argv[1]}/{name}", factors)
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.model.rotary_emb.inv_freq, model.config.rope_parameters


with_factors, settings = frequencies("scaled.gguf", (plain / wanted).numpy().astype(np.float32))
without, _ = frequencies("plain.gguf", None)
print("rope settings read:", settings)
print("lowest frequency: wanted", float(wanted[-1]), "read", float(with_factors[-1]))
assert torch.equal(with_factors, without)
assert not torch.allclose(with_factors, wanted, rtol=0.01)
assert settings["rope_type"] == "default"
PYTHON
echo "seen as described: the rotary factors of a GGUF file are not read"
