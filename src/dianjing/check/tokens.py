"""The number of tokens of each record for one LLM, with what a recipe does to the long ones: training's own encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dianjing.config.schema import DataConfig
from dianjing.constants import IGNORE_INDEX
from dianjing.data.encode import Encoder, LongRecordError, image_token_id, load_tokenizer, prepared
from dianjing.data.picture_tokens import PictureTokens
from dianjing.data.record import Record, turns_alone
from dianjing.data.template import template_for
from dianjing.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The settings that decide how records become tokens; small enough to be sent to every process."""

    tokenizer_folder: str
    template: str
    picture_tokens: PictureTokens
    data: DataConfig
    strings_missing: tuple[str, ...] = ()
    """Special strings of the template that are plain text to the tokenizer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One record, or one of its turns alone, as a run reads it."""

    positions: int
    """With its pictures; 0 when it is not used."""
    supervised: int
    truncated: int
    """Tokens cut off."""
    images: tuple[str, ...]
    code: str = ""
    text: str = ""
    """Why it is not used, or what is cut."""


class Measurer:
    """Measures records, the tokenizer called once for many of them."""

    def __init__(self, reading: Reading) -> None:
        self._data = reading.data
        tokenizer = load_tokenizer(reading.tokenizer_folder)
        template, _ = template_for(tokenizer, reading.template)
        self._encoder = Encoder(
            tokenizer=tokenizer,
            template=template,
            picture_tokens=reading.picture_tokens,
            max_tokens=reading.data.max_tokens,
            on_long_record=reading.data.on_long_record,
            image_token_id=image_token_id(tokenizer),
        )
        special = {*template.special_strings, *template.stop_words, *tokenizer.all_special_tokens}
        self.special_strings = tuple(sorted(text for text in special if text.strip()))

    def measure(self, records: Sequence[Record]) -> list[list[Measured]]:
        """Return the measures of each record; of its turns alone too, where the recipe trains on them."""
        items = [[record, *self._turns_alone(record)] for record in records]
        encoder = prepared(self._encoder, (record for group in items for record in group))
        return [[self._measured(encoder, record) for record in group] for group in items]

    def _turns_alone(self, record: Record) -> list[Record]:
        if self._data.turns != "both" or len(record.turns) == 1:
            return []
        return [alone for alone in turns_alone(record) if alone.turns[0].learned]

    def _measured(self, encoder: Encoder, record: Record) -> Measured:
        try:
            example = encoder.encode(record)
        except LongRecordError as error:
            code = "too_long" if self._data.on_long_record == "error" else "too_long_skipped"
            return Measured(0, 0, 0, record.images, code, _without_place(error, record))
        except DataError as error:
            return Measured(0, 0, 0, record.images, "cut_too_deep", _without_place(error, record))
        positions = len(example.input_ids)
        if positions > self._data.pack_tokens:
            text = f"{positions} positions with its pictures, but data.pack_tokens is {self._data.pack_tokens}"
            return Measured(0, 0, 0, record.images, "beyond_pack", text)
        supervised = len(example.labels) - example.labels.count(IGNORE_INDEX)
        if example.truncated:
            text = f"{example.truncated} tokens beyond data.max_tokens ({self._data.max_tokens}) are cut off"
            return Measured(positions, supervised, example.truncated, record.images, "truncated", text)
        return Measured(positions, supervised, 0, record.images)


def _without_place(error: DataError, record: Record) -> str:
    return str(error).removeprefix(f"{record.where}: ")
