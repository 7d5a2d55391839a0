"""Small GGUF files of text LLMs, written by llama.cpp's own package from random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, FFN, LAYERS, HEADS, GROUPS, HEAD = 256, 512, 2, 4, 2, 64
PIECES = ["<|endoftext|>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf_llm(
    path: Path, architecture: str = "llama", kind: str = "F16", *, factors: Any = None, **changes: Any
) -> Path:
    """Write a random LLM of an architecture, its matrices in a type of GGML.

    `factors` divide the rotary frequencies, `changes` are keys to add or replace.
    """
    import gguf

    tokens = tokenizer_keys(architecture)
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": 512,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": HEAD,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "vocab_size": len(tokens["tokenizer.ggml.tokens"]),
        **({"attention.sliding_window": 128} if architecture == "gemma3" else {}),
    }
    every = {f"{architecture}.{name}": value for name, value in keys.items()} | tokens | changes
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for name, value in every.items():
        (writer.add_array if isinstance(value, list) else add[type(value)])(name, value)
    random = np.random.default_rng(3)
    for name, shape in tensors(architecture, len(tokens["tokenizer.ggml.tokens"])).items():
        numbers = random.standard_normal(shape, dtype=np.float32) * 0.05 + (1 if "norm" in name else 0)
        if len(shape) == 1:
            writer.add_tensor(name, numbers)
        elif kind == "Q4_K":
            writer.add_tensor(name, q4_k(random, shape), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(numbers, stored), raw_dtype=stored)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(architecture: str, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the sizes of the tensors that llama.cpp has for an architecture."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if architecture != "gemma3":
        found["output.weight"] = (vocabulary, HIDDEN)
    for layer in range(LAYERS):
        sizes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * HEAD, HIDDEN),
            "attn_k.weight": (GROUPS * HEAD, HIDDEN),
            "attn_v.weight": (GROUPS * HEAD, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * HEAD),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (FFN, HIDDEN),
            "ffn_up.weight": (FFN, HIDDEN),
            "ffn_down.weight": (HIDDEN, FFN),
        }
        if architecture == "qwen2":
            heads = {"q": HEADS, "k": GROUPS, "v": GROUPS}
            sizes |= {f"attn_{name}.bias": (number * HEAD,) for name, number in heads.items()}
        if architecture == "gemma3":
            sizes |= dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (HIDDEN,))
            sizes |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (HEAD,))
        found |= {f"blk.{layer}.{name}": shape for name, shape in sizes.items()}
    return found


def tokenizer_keys(architecture: str) -> dict[str, Any]:
    """Return the keys of a tokenizer: byte-level for Llama and Qwen2, on SentencePiece's marks for Gemma."""
    if architecture == "gemma3":
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
        words = ["\u2581", *"abcdefghilmnoprstuwy", "th", "he", "the", "\u2581t", "\u2581th", "in", "at", "hat"]
        kinds = [3, 3, 3, 2, 3, *[6] * 256, *[1] * len(words)]
        scores = [*[0.0] * len(pieces), *(-float(number) for number in range(len(words)))]
        special = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
        tokens = {"model": "llama", "tokens": pieces + words, "scores": scores, "token_type": kinds}
    else:
        from tokenizers.pre_tokenizers import ByteLevel

        letters = sorted(ByteLevel.alphabet())
        merges = ["t h", "th e", "i n", "a t", "h at"]
        words = [*letters, *(merge.replace(" ", "") for merge in merges)]
        kinds = [3] * len(PIECES) + [1] * len(words)
        special = {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
        tokens = {"model": "gpt2", "tokens": PIECES + words, "merges": merges, "token_type": kinds}
    ids = {f"{name}_token_id": number for name, number in special.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in (tokens | ids).items()} | {
        "tokenizer.chat_template": CHATML
    }


def q4_k(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return blocks of Q4_K, which the package cannot write: two fp16 scales, 12 bytes of scales, 128 of numbers."""
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // 256, 144), dtype=np.uint8)
    scales = random.uniform(0.0001, 0.0005, (*blocks.shape[:-1], 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
