"""Tokenizer -> the keys from which llama.cpp makes the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dianjing.errors import ExportError

if TYPE_CHECKING:
    from dianjing.export.gguf.file import Value  # needs the package gguf

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of a token."""
SPACE = "\u2581"
UNMERGED_SCORE = -1e9
"""Of a token that is never made of two: below that of every one that is."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL: ("qwen2", False),
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL: ("llama-bpe", True),
}
"""Regular expression of the pre-tokenizer -> llama.cpp's name for it, and whether it ignores merges with it."""


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> dict[str, Value]:
    """Return the keys of a tokenizer; `rows` is the height of the embedding, `ends` the tokens that end a turn.

    No BOS is asked for: the chat template writes it.

    Raises:
        ExportError: a kind of tokenizer that llama.cpp would not make the same ids with.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ExportError("the tokenizer has no tokenizer.json form; convert it to a fast tokenizer first")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f'GGUF: a tokenizer of type "{model["type"]}" cannot be written (BPE can)')
    added = {token["id"]: token for token in content["added_tokens"]}
    _check_added(added)
    tokens, types = _tokens(model, added, rows)
    if _steps(content["pre_tokenizer"], "ByteLevel"):
        keys = _byte_level(content)
    else:
        keys = _sentencepiece(content) | {"tokenizer.ggml.scores": _scores(tokens, model["merges"])}
        types = [_sentencepiece_type(*pair, model["unk_token"]) for pair in zip(tokens, types, strict=True)]
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "eot_token_id": next((end for end in ends if end != tokenizer.eos_token_id), None),
    }
    return {
        **keys,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **{f"tokenizer.ggml.{name}": value for name, value in special.items() if isinstance(value, int)},
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _check_added(added: Mapping[int, Mapping[str, Any]]) -> None:
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ExportError(
                f"GGUF: the token {token['content']!r} takes the blanks next to it (lstrip, rstrip or single_word); "
                "llama.cpp would leave them"
            )


def _tokens(model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of each row of the embedding; rows without a token get one that is never written."""
    text = {number: token for token, number in model["vocab"].items()}
    text |= {number: token["content"] for number, token in added.items()}
    if max(text) >= rows:
        # Only <image> may lie outside: it stands for features, which llama.cpp puts there itself.
        text = {number: token for number, token in text.items() if number < rows}
    tokens = [text.get(number, f"[PAD{number}]") for number in range(rows)]
    types = [UNUSED if number not in text else NORMAL for number in range(rows)]
    for number, token in added.items():
        if number < rows:
            types[number] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


def _byte_level(content: Mapping[str, Any]) -> dict[str, Value]:
    """Return the keys of a byte-level BPE: GPT-2's, or one that splits by a known expression."""
    steps = _steps(content["pre_tokenizer"])
    last = steps[-1]
    ignores_merges = bool(content["model"].get("ignore_merges"))
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown(content, "pre_tokenizer")
    if content["normalizer"] and content["normalizer"]["type"] != "NFC":
        raise _unknown(content, "normalizer")
    if len(steps) == 1 and last["use_regex"]:
        name, expected = "gpt-2", False
    elif len(steps) == 2 and steps[0]["type"] == "Split" and not last["use_regex"]:
        split = steps[0]
        known = PRE_TOKENIZERS.get(split["pattern"].get("Regex", ""))
        if known is None or split["behavior"] != "Isolated" or split["invert"]:
            raise _unknown(content, "pre_tokenizer")
        name, expected = known
    else:
        raise _unknown(content, "pre_tokenizer")
    if ignores_merges != expected:
        raise ExportError(f'GGUF: llama.cpp\'s pre-tokenizer "{name}" needs ignore_merges = {expected}')
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _sentencepiece(content: Mapping[str, Any]) -> dict[str, Value]:
    """Return the keys of a BPE on text whose blanks are written as SPACE, with a token for each byte."""
    model, normalizers = content["model"], _steps(content["normalizer"], key="normalizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if not model.get("byte_fallback") or any(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256)):
        raise ExportError("GGUF: this BPE is neither byte-level nor has it a token for each byte (byte_fallback)")
    if model.get("ignore_merges"):
        raise ExportError("GGUF: llama.cpp does not know ignore_merges for this kind of tokenizer")
    if content.get("pre_tokenizer") is not None:
        raise _unknown(content, "pre_tokenizer")
    if normalizers not in ([replace], [prepend, replace]):
        raise _unknown(content, "normalizer")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prepend in normalizers,
    }


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Return a score for each token: llama.cpp merges the pair whose result has the highest, so the rank, negated."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), number)
    return [-float(rank[token]) if token in rank else UNMERGED_SCORE for token in tokens]


def _sentencepiece_type(token: str, kind: int, unknown: str | None) -> int:
    if kind == NORMAL and len(token) == 6 and token.startswith("<0x"):
        return BYTE
    return UNKNOWN if token == unknown else kind


def _steps(step: Mapping[str, Any] | None, kind: str = "", key: str = "pretokenizers") -> list[Mapping[str, Any]]:
    """Return the steps of a Sequence, or the one there is; only those of a type if `kind` names one."""
    steps = [] if step is None else step[key] if step["type"] == "Sequence" else [step]
    return [one for one in steps if not kind or one["type"] == kind]


def _unknown(content: Mapping[str, Any], part: str) -> ExportError:
    text = json.dumps(content[part], ensure_ascii=False)
    return ExportError(
        f"GGUF: llama.cpp is not known to split text as this tokenizer's {part} does: {text[:300]}; export as hf"
    )
