"""Tokenizers in a GGUF: llama.cpp makes the same ids, or the export is refused."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dianjing.data.template import text_ids
from dianjing.errors import ExportError
from tests.tiny import SPECIALS

pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'dianjing[gguf]'")
from dianjing.export.gguf.file import TYPES, write_gguf
from dianjing.export.gguf.tokenizer import PRE_TOKENIZERS, SPACE, tokenizer_keys

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: pip install llama-cpp-python"
)

TEXTS = [
    *(
        "Hello world",
        "  two  spaces   three ",
        "",
        " ",
        "\n",
        "tabs\tand\n\nnewlines\n",
        "I'll say it's SHE'LL, they'VE",
    ),
    *("<s><|im_start|>user\nWhat is 1234567 + 3.14?<|im_end|>\n<|im_start|>assistant\n", "你好，世界！描述这张图片。"),
    *(
        "caf\u00e9 \u041f\u0440\u0438\u0432\u0435\u0442 \U0001f917",
        "def f(x):\n    return x**2 # ok\r\n",
        "a<|im_end|>b",
    ),
    *("The quick brown fox jumps over the lazy dog. " * 3, "x" * 40, "...!?--", "<0x41>", "\u00a0wide\u3000blank"),
]
QWEN2, LLAMA3 = PRE_TOKENIZERS
Ids = Callable[[PreTrainedTokenizerFast, str], list[int]]


def train(pre_tokenizer: Any, normalizer: Any = None, **settings: Any) -> PreTrainedTokenizerFast:
    """Train a BPE on TEXTS."""
    tokenizer = Tokenizer(models.BPE(**settings))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    sentencepiece = settings.get("byte_fallback")
    alphabet = [] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    specials = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256) if sentencepiece)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    content = tokenizer.to_str()
    if sentencepiece:
        # The bytes are tokens of the vocabulary and no special ones.
        loaded = json.loads(content)
        loaded["added_tokens"] = [token for token in loaded["added_tokens"] if not token["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(loaded))
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def split(expression: str, **settings: Any) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), settings.get("behavior", "isolated")),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece(*, prefix: bool) -> PreTrainedTokenizerFast:
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    replace = normalizers.Replace(" ", SPACE)
    return train(None, normalizers.Sequence([*steps, replace]), byte_fallback=True, unk_token="<unk>", fuse_unk=True)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen2": lambda: train(split(QWEN2), normalizers.NFC()),
    "llama-bpe": lambda: train(split(LLAMA3), ignore_merges=True),
    "default": lambda: sentencepiece(prefix=False),
    "default, with a blank before": lambda: sentencepiece(prefix=True),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_kind_is_found(kind: str) -> None:
    tokenizer = KINDS[kind]()
    keys = tokenizer_keys(tokenizer, 1000, [2, 4])
    assert keys["tokenizer.ggml.pre"] == kind.partition(",")[0]
    assert keys.get("tokenizer.ggml.add_space_prefix", False) == ("before" in kind)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert len(tokens) == len(types) == len(set(tokens)) == 1000
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert types[1] == types[4] == 3
    assert types[len(tokenizer) :] == [5] * (1000 - len(tokenizer))
    assert keys["tokenizer.ggml.eot_token_id"] == 4
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert sum(kind == 6 for kind in types) == (256 if kind.startswith("default") else 0)


@pytest.fixture
def llama_ids(tmp_path: Path) -> Iterator[Ids]:
    """Return what llama.cpp makes of a text; each tokenizer is written to a file without weights."""
    llama: Any = importlib.import_module("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, None)
    vocabularies: dict[int, Any] = {}

    def load(tokenizer: PreTrainedTokenizerFast) -> Any:
        path = tmp_path / "vocabulary.gguf"
        sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
        keys = {
            "general.architecture": "llama",
            **{f"llama.{name}": 8 for name in sizes},
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            **tokenizer_keys(tokenizer, len(tokenizer), [2]),
        }
        write_gguf(path, keys, {"none": torch.zeros(8)}, lambda name, tensor: TYPES["f32"])
        settings = llama.llama_model_default_params()
        settings.vocab_only = True
        return llama.llama_model_load_from_file(str(path).encode(), settings)

    def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        model = vocabularies.setdefault(id(tokenizer), None) or load(tokenizer)
        vocabularies[id(tokenizer)] = model
        data = text.encode()
        found = (llama.llama_token * (len(data) + 16))()
        vocabulary = llama.llama_model_get_vocab(model)
        count = llama.llama_tokenize(vocabulary, data, len(data), found, len(found), True, True)
        return list(found[:count])

    yield ids
    for model in vocabularies.values():
        llama.llama_model_free(model)
    llama.llama_log_set(ctypes.cast(None, llama.llama_log_callback), None)


@needs_llama
@pytest.mark.parametrize("kind", list(KINDS))
def test_llama_cpp_makes_the_same_ids(
    kind: str, llama_ids: Callable[[PreTrainedTokenizerFast, str], list[int]]
) -> None:
    tokenizer = KINDS[kind]()
    for text in TEXTS:
        assert llama_ids(tokenizer, text) == text_ids(tokenizer, text), text


def added(**settings: bool) -> PreTrainedTokenizerFast:
    tokenizer = KINDS["gpt-2"]()
    tokenizer.add_tokens([AddedToken("<blank>", **settings)])
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece(prefix=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: train(split(r"\p{L}+")), "pre_tokenizer"),
        (lambda: train(split(QWEN2, behavior="removed")), "pre_tokenizer"),
        (lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=True)), "pre_tokenizer"),
        (lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()), "normalizer"),
        (lambda: train(split(LLAMA3)), "ignore_merges"),
        (lambda: train(pre_tokenizers.Whitespace()), "byte"),
        (metaspace, "pre_tokenizer"),
        (lambda: added(lstrip=True), "<blank>"),
        (lambda: added(rstrip=True), "<blank>"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(make: Callable[[], Any], word: str) -> None:
    with pytest.raises(ExportError, match=word):
        tokenizer_keys(make(), 1000, [2])


def test_a_word_level_tokenizer_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(ExportError, match="WordLevel"):
        tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=words), 4, [])


def test_the_picture_may_lie_outside_the_embedding() -> None:
    """Its id stands for features; a row for it is not needed."""
    tokenizer = KINDS["gpt-2"]()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokens = tokenizer_keys(tokenizer, rows, [2])["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == rows
    assert "<image>" not in tokens
