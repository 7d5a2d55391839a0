"""tokenizer.model (sentencepiece, BPE) -> the fast tokenizer with the same ids, as its configuration renames them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dianjing.errors import ModelError

BLANK = "▁"
"""The character that sentencepiece writes for a blank."""
CONTROL, USER_DEFINED = 3, 4
BPE = 2

Fields = dict[int, list[Any]]
"""A protobuf message: field number -> its values, undecoded bytes where the wire has a length."""


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """The contents of a tokenizer.model, as far as it decides ids."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    charsmap: bytes
    """A compiled table that rewrites characters; empty in the models of LLMs."""
    dummy_prefix: bool
    """A text begins with a blank that nobody wrote."""
    squeeze: bool
    """Blanks at the ends are taken away, and several are one."""
    special: Mapping[str, str]
    """The model's own unk_token, bos_token and eos_token."""


def load_sentencepiece(folder: Path, config: Mapping[str, Any], **settings: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder that has tokenizer.model, as tokenizer_config.json (`config`) changes it.

    Raises:
        ModelError: the file is damaged, or no BPE model.
    """
    path = folder / "tokenizer.model"
    model = read_sentencepiece(path)
    added = _added_tokens(folder, config)
    pieces = list(model.pieces)
    for number, token in sorted(added.items()):
        # InternLM2 gives pieces that its model leaves unused another name, under their own ids.
        if number < len(pieces):
            pieces[number] = token.content
        elif number > len(pieces):
            raise ModelError(f"{folder}: token {token.content!r} has id {number}, but {len(pieces)} is the next free")
        else:
            pieces.append(token.content)
    if len(set(pieces)) != len(pieces):
        raise ModelError(f"{folder}: tokenizer_config.json gives a token the name of another one of tokenizer.model")
    backend = _backend(model, pieces, added, config)
    named = {name: _content(config.get(name, model.special.get(name))) for name in (*model.special, "pad_token")}
    named = {name: token for name, token in named.items() if token in pieces}
    if config.get("add_bos_token", True) and "bos_token" in named:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(folder, config),
        model_max_length=config.get("model_max_length", int(1e30)),
        **named | settings,
    )


def read_sentencepiece(path: Path) -> SentencePiece:
    """Return what a tokenizer.model holds.

    Raises:
        ModelError: it is damaged, or no BPE model.
    """
    try:
        fields = _message(path.read_bytes())
        pieces = [_message(raw) for raw in fields[1]]
        trainer, normalizer = _message(fields.get(2, [b""])[0]), _message(fields.get(3, [b""])[0])
        texts = tuple(bytes(piece[1][0]).decode() for piece in pieces)
        model = SentencePiece(
            pieces=texts,
            scores=tuple(struct.unpack("<f", piece.get(2, [b"\0\0\0\0"])[0])[0] for piece in pieces),
            kinds=tuple(piece.get(3, [1])[0] for piece in pieces),
            charsmap=normalizer.get(2, [b""])[0],
            dummy_prefix=bool(normalizer.get(3, [1])[0]),
            squeeze=bool(normalizer.get(4, [1])[0]),
            special={
                name: texts[number]
                for name, field, default in (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2))
                if 0 <= (number := _signed(trainer.get(field, [default])[0])) < len(texts)
            },
        )
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: damaged, or no sentencepiece model ({error!r}); copy it again") from None
    if trainer.get(3, [1])[0] != BPE:
        raise ModelError(f"{path}: only sentencepiece models of the kind BPE are read; save a tokenizer.json there")
    return model


def _message(data: bytes) -> Fields:
    fields: Fields = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message; see protobuf.dev/programming-guides/encoding."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("it ends too early")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has no end")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _backend(
    model: SentencePiece, pieces: list[str], added: Mapping[int, AddedToken], config: Mapping[str, Any]
) -> Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    special = model.special
    tokenizer: Any = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model, vocabulary),
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    legacy = config.get("legacy", True)
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.dummy_prefix and legacy:
        steps.append(normalizers.Prepend(BLANK))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    if model.dummy_prefix and not legacy:
        # Only the beginning of the whole text gets the blank then, not what follows a special token.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=BLANK, prepend_scheme="first", split=False)
    steps_back: list[Any] = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.dummy_prefix:
        steps_back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps_back)
    # InternLM2's own fast tokenizer leaves pieces marked "user defined" to BPE.
    own = "internlm" in str(config.get("tokenizer_class")).lower()
    for number, (piece, kind) in enumerate(zip(pieces, model.kinds, strict=False)):
        if number not in added and (kind == CONTROL or piece in special.values()):
            tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True)])
        elif number not in added and kind == USER_DEFINED and not own:
            tokenizer.add_tokens([AddedToken(piece, normalized=False)])
    for _, token in sorted(added.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _merges(model: SentencePiece, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return every way to make a piece of two others, the best scores first: sentencepiece joins the pair whose
    result scores best."""
    merges = [
        (-score, len(left), len(right), vocabulary[left], vocabulary[right], left, right)
        for piece, score in zip(model.pieces, model.scores, strict=True)
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in vocabulary and (right := piece[cut:]) in vocabulary and piece in vocabulary
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens that tokenizer_config.json, or added_tokens.json before it, puts at an id."""
    old = folder / "added_tokens.json"
    names: dict[str, int] = json.loads(old.read_text(encoding="utf-8")) if old.is_file() else {}
    found = {int(number): AddedToken(name, normalized=False, special=True) for name, number in names.items()}
    for number, fields in config.get("added_tokens_decoder", {}).items():
        kept = {name: fields[name] for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        found[int(number)] = AddedToken(fields["content"], **kept)
    return found


def _content(token: Any) -> str | None:
    """Return a token's text, written in a configuration as text or as an object with `content`."""
    return cast(Any, token)["content"] if isinstance(token, Mapping) else token


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    written: Any = config.get("chat_template")
    if not isinstance(written, list):
        return written
    return next((entry["template"] for entry in cast(list[Any], written) if entry["name"] == "default"), None)
