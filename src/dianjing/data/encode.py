"""Spans -> Example(input_ids, labels), with XTuner's ids; each `<image>` becomes its run of image tokens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dianjing.config.schema import OnLong
from dianjing.constants import IGNORE_INDEX, IMAGE_MARKER
from dianjing.data.picture_tokens import PictureTokens, Size, expand
from dianjing.data.record import Record, Turn
from dianjing.data.sentencepiece import load_sentencepiece
from dianjing.data.template import Span, Template, prompt, spans, text_ids
from dianjing.errors import DataError, ModelError


class LongRecordError(DataError):
    """A record has more than max_tokens tokens, and the recipe does not cut records."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record as the model reads it."""

    id: str
    input_ids: list[int]
    labels: list[int]
    """As long as input_ids and unshifted; IGNORE_INDEX where nothing is learned."""
    images: tuple[str, ...]
    num_images: int
    image_lengths: tuple[int, ...]
    """Image tokens of each picture."""
    truncated: int
    """Tokens cut off its end, a picture counted as one."""
    source: str
    index: int


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns records into ids and labels for one LLM, one template and one vision tower.

    Raises:
        ModelError: the template ends turns with EOS and the tokenizer has none.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    picture_tokens: PictureTokens
    max_tokens: int
    """Longest record, a picture counted as one."""
    on_long_record: OnLong
    image_token_id: int

    def __post_init__(self) -> None:
        if not self.template.suffix_as_eos and self.tokenizer.eos_token_id is None:
            raise ModelError(
                f'the template "{self.template.name}" ends an answer with EOS, which this tokenizer has not; '
                "choose the LLM's own template, or set eos_token in its tokenizer_config.json"
            )

    def encode(self, record: Record, sizes: Sequence[Size] = ()) -> Example:
        """Return the record's ids and labels; `sizes` are those of its pictures, where they are known.

        Raises:
            LongRecordError: it is longer than max_tokens, which on_long_record does not cut.
            DataError: the cut leaves no answer, or takes a picture away.
        """
        input_ids, labels, truncated = self.tokens(record)
        counts = self.counts(len(record.images), sizes)
        return Example(
            id=record.id,
            input_ids=expand(input_ids, input_ids, self.image_token_id, counts),
            labels=expand(input_ids, labels, self.image_token_id, counts),
            images=record.images,
            num_images=len(record.images),
            image_lengths=counts,
            truncated=truncated,
            source=record.source,
            index=record.index,
        )

    def tokens(self, record: Record) -> tuple[list[int], list[int], int]:
        """Return the record's ids and labels with one image token a picture, and how many tokens were cut off.

        Raises:
            LongRecordError, DataError: as `encode` does.
        """
        input_ids, labels = self._tokens(spans(self.template, record.turns))
        truncated = max(len(input_ids) - self.max_tokens, 0)
        if truncated:
            if self.on_long_record != "truncate":
                raise LongRecordError(
                    f"{record.where}: {len(input_ids)} tokens, but max_tokens is {self.max_tokens}; shorten "
                    'it, raise data.max_tokens, or set data.on_long_record to "truncate" or "skip"'
                )
            input_ids, labels = input_ids[: self.max_tokens], labels[: self.max_tokens]
        cut = f"; raise data.max_tokens ({self.max_tokens}), or remove the record" if truncated else ""
        if input_ids.count(self.image_token_id) != len(record.images):
            raise DataError(f"{record.where}: a picture lies beyond the cut{cut}")
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise DataError(f"{record.where}: no answer is left to learn from{cut}")
        return input_ids, labels, truncated

    def counts(self, pictures: int, sizes: Sequence[Size] = ()) -> tuple[int, ...]:
        """Return the tokens of each of a number of pictures; `sizes` are those of the first of them."""
        known = [*sizes[:pictures], *[None] * (pictures - len(sizes))]
        return tuple(self.picture_tokens(size) for size in known)

    def prompt(
        self, history: Sequence[tuple[str, str]], question: str, sizes: Sequence[Size] = ()
    ) -> tuple[list[int], int]:
        """Return the ids up to where the answer begins, and how many pictures they show.

        They are what training shows before that answer. `history` holds (question, answer); questions
        are as in a Record, their markers placed (`record.place_marker` does that). `sizes` as for `encode`.
        """
        turns = [Turn(question=asked, answer=answer) for asked, answer in history]
        input_ids, _ = self._tokens(prompt(self.template, turns, question))
        pictures = input_ids.count(self.image_token_id)
        return expand(input_ids, input_ids, self.image_token_id, self.counts(pictures, sizes)), pictures

    def _tokens(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Return ids and labels with one image token a picture."""
        input_ids: list[int] = []
        labels: list[int] = []
        before = ""
        for span in spans:
            ids = self._answer(span.text, before) if span.supervised else self._question(span.text, before)
            if span.bos:
                ids = [*_one_id(self.tokenizer.bos_token_id), *ids]
            if span.eos:
                ids = [*ids, *_one_id(self.tokenizer.eos_token_id)]
            input_ids += ids
            labels += ids if span.supervised and span.learned else [IGNORE_INDEX] * len(ids)
            if self.template.joined and span.text:
                before = span.text if span.supervised else span.text.rpartition(IMAGE_MARKER)[-1]
        return input_ids, labels

    def _question(self, text: str, before: str) -> list[int]:
        # The pieces around a picture are tokenised apart, as XTuner does: their ids depend on it.
        first, *others = text.split(IMAGE_MARKER)
        ids = self._text(first, before)
        for piece in others:
            ids += [self.image_token_id, *self._text(piece)]
        return ids

    def _answer(self, text: str, before: str) -> list[int]:
        ids = self._text(text, before)
        if self.image_token_id not in ids:
            return ids
        # A tokenizer that knows the marker would make a picture of it; split, it stays the text it is.
        first, *others = re.split("(?<=<)(?=image>)", text)
        return [*self._text(first, before), *(token for half in others for token in self._text(half))]

    def _text(self, text: str, before: str = "") -> list[int]:
        """Return the ids of a text, as they are after the text `before` where no token reaches over the cut."""
        if before:
            head, whole = self._ids(before), self._ids(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)


@dataclass(frozen=True, kw_only=True)
class _Collector(Encoder):
    """Takes note of the texts that it would need the ids of."""

    texts: set[str] = field(default_factory=set[str])

    def collect(self, record: Record) -> None:
        """Take note of the texts of a record."""
        self._tokens(spans(self.template, record.turns))

    def _ids(self, text: str) -> list[int]:
        self.texts.add(text)
        return []


@dataclass(frozen=True, kw_only=True)
class _Prepared(Encoder):
    """Has the ids of many texts at hand."""

    ids: Mapping[str, list[int]]

    def _ids(self, text: str) -> list[int]:
        found = self.ids.get(text)
        # A list that is returned is appended to.
        return super()._ids(text) if found is None else list(found)


def prepared(encoder: Encoder, records: Iterable[Record]) -> Encoder:
    """Return an encoder with the same results, quick for these records: the tokenizer is called once for all."""
    settings = {one.name: getattr(encoder, one.name) for one in fields(encoder)}
    collector = _Collector(**settings)
    for record in records:
        collector.collect(record)
    texts = list(collector.texts)
    found = plain_backend(encoder.tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return _Prepared(**settings, ids=dict(zip(texts, (one.ids for one in found), strict=True)))


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what makes the ids of `text_ids`, set as that sets it: nothing is cut or padded."""
    backend = cast(Any, tokenizer).backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = cast(Any, tokenizer).split_special_tokens
    return backend


def _one_id(token_id: object) -> list[int]:
    """Return a tokenizer's BOS or EOS as a list, empty where it has none."""
    return [] if token_id is None else [cast(int, token_id)]


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of an image token: the tokenizer's own `<image>`, else the first id it does not use."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(IMAGE_MARKER, max(vocabulary.values()) + 1)


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a folder, from its tokenizer.json, its tokenizer.model, or its vocab.json and
    merges.txt; none of its code is run.

    Raises:
        ModelError: it has none of them, or they cannot be read.
    """
    folder = Path(folder)
    try:
        config = _tokenizer_config(folder)
        # XTuner gives a Qwen tokenizer no BOS, whatever its settings say.
        qwen = str(config.get("tokenizer_class")).lower().startswith("qwen")
        settings: dict[str, Any] = {"bos_token": None} if qwen else {}
        if (folder / "tokenizer.json").is_file():
            loader = cast(Any, PreTrainedTokenizerFast)
            loaded = loader.from_pretrained(os.fspath(folder), local_files_only=True, **settings)
            if not isinstance(longest := loaded.model_max_length, int | float):
                raise ModelError(
                    f"{folder}: model_max_length in tokenizer_config.json is {longest!r:.40}, not a number"
                )
            return loaded
        if (folder / "tokenizer.model").is_file():
            return load_sentencepiece(folder, config, **settings)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            from transformers import AutoTokenizer  # imports torch

            loader = cast(Any, AutoTokenizer)
            return loader.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False, **settings)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception for what it cannot read
        raise ModelError(f"{folder}: its tokenizer cannot be read: {error}") from error
    others = sorted(one.name for one in folder.glob("*.tiktoken"))
    there = f" ({others[0]} is not read)" if others else ""
    raise ModelError(
        f"{folder}: there is no tokenizer.json, no tokenizer.model, and no vocab.json with merges.txt{there}; copy the "
        "LLM's tokenizer there"
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
