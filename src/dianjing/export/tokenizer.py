"""Tokenizer -> tokenizer.json and tokenizer_config.json that 4.x and 5.x read alike, with the image token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from dianjing.constants import IMAGE_MARKER
from dianjing.data.encode import Encoder
from dianjing.data.template import Template, answer_end
from dianjing.errors import ExportError

UNLIMITED = int(1e30)
"""As transformers writes it for a tokenizer without a length limit."""


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, encoder: Encoder, chat_template: str, max_length: int, folder: Path
) -> None:
    """Write the tokenizer's files; the tokenizer in memory stays as it is.

    The written tokenizer adds no BOS: the chat template does, and two would be one too many. Its EOS is the token
    that ends an answer in training: some readers stop at that one alone, whatever generation_config.json names.

    Raises:
        ExportError: the tokenizer has no Rust backend, or `<image>` does not get its id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ExportError("the tokenizer has no tokenizer.json form; convert it to a fast tokenizer first")
    copy = Tokenizer.from_str(_without_bos(backend.to_str()))
    copy.no_padding()
    copy.no_truncation()
    copy.add_special_tokens([AddedToken(IMAGE_MARKER, normalized=False, special=True)])
    if copy.token_to_id(IMAGE_MARKER) != encoder.image_token_id:
        raise ExportError(
            f"{IMAGE_MARKER} became token {copy.token_to_id(IMAGE_MARKER)} but training used {encoder.image_token_id}; "
            "the tokenizer's ids have a gap before its end"
        )
    copy.save(str(folder / "tokenizer.json"))
    named = _named_tokens(tokenizer, encoder.template)
    config = _tokenizer_config(named, copy, chat_template, max_length)
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _tokenizer_config(
    named: Mapping[str, str], written: Tokenizer, chat_template: str, max_length: int
) -> dict[str, Any]:
    added = written.get_added_tokens_decoder()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in sorted(added.items())
        },
        "additional_special_tokens": [
            token.content for _, token in sorted(added.items()) if token.special and token.content not in named.values()
        ],
        "chat_template": chat_template,
        **named,
    }


def _named_tokens(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, str]:
    """Return BOS, EOS, UNK and PAD, as far as there are; padding falls back to UNK, then EOS."""
    padding = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    named = {
        "bos_token": tokenizer.bos_token,
        "eos_token": answer_end(template, tokenizer) or None,
        "unk_token": tokenizer.unk_token,
        "pad_token": padding,
    }
    return {name: str(token) for name, token in named.items() if token is not None}


def _without_bos(tokenizer_json: str) -> str:
    """Return tokenizer.json without the step that puts special tokens around a text."""
    content = json.loads(tokenizer_json)
    after = content.get("post_processor") or {}
    steps = after.get("processors", [after]) if after else []
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    content["post_processor"] = kept[0] if kept else None
    return json.dumps(content, ensure_ascii=False)
