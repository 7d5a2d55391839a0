"""Record -> text spans, each supervised or not, by the chat template of the LLM."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from dianjing.data.record import Turn
from dianjing.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class Template:
    """How one LLM was taught to tell a question from an answer; fields and values are XTuner's."""

    name: str
    instruction: str
    """What stands before an answer, with {input} for the question and maybe {round} for its number from 1."""
    suffix: str
    """Ends an answer and is learned with it."""
    suffix_as_eos: bool
    """The suffix ends a turn; otherwise EOS does, after the suffix, and BOS begins the next turn."""
    sep: str
    """Stands between turns, not learned."""
    stop_words: tuple[str, ...]
    """End an answer when the model writes one of them."""
    special_strings: tuple[str, ...]
    """Strings of the template that are each one token of the LLM it was made for."""


@dataclass(frozen=True)
class Span:
    """A text that is tokenised on its own; `bos` begins and `eos` ends it with that token."""

    text: str
    supervised: bool
    bos: bool = False
    eos: bool = False


def _read_templates() -> dict[str, Template]:
    text = files("dianjing.data").joinpath("templates.json").read_text(encoding="utf-8")
    return {
        name: Template(
            name=name,
            instruction=fields["instruction"],
            suffix=fields.get("suffix", ""),
            suffix_as_eos=fields.get("suffix_as_eos", False),
            sep=fields.get("sep", ""),
            stop_words=tuple(fields.get("stop_words", ())),
            special_strings=tuple(fields.get("special_strings", ())),
        )
        for name, fields in json.loads(text).items()
    }


TEMPLATES: Mapping[str, Template] = _read_templates()


def get_template(name: str) -> Template:
    """Return a chat template.

    Raises:
        ModelError: there is none of this name.
    """
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ModelError(f'unknown template "{name}"; {hint}There are: {", ".join(TEMPLATES)}')
    return TEMPLATES[name]


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the template whose special strings and stop words the tokenizer knows; of several
    the one with most of them.

    Raises:
        ModelError: no template, or more than one, fits best.
    """
    fits: dict[str, int] = {}
    for template in TEMPLATES.values():
        marks_turns = any(string in template.instruction for string in template.special_strings)
        strings = {*template.special_strings, *template.stop_words}
        if marks_turns and all(_is_one_token(string, tokenizer) for string in strings):
            fits[template.name] = len(strings)
    best = [name for name, known in fits.items() if known == max(fits.values())]
    if len(best) != 1:
        found = f"more than one fits ({', '.join(best)})" if best else "its tokens are those of no known one"
        raise ModelError(
            f"the chat template of this LLM is unclear: {found}; name it "
            f"(language_model.template, or --template), one of: {', '.join(best or TEMPLATES)}"
        )
    return best[0]


def special_strings_missing(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special strings of the template that the tokenizer would split into plain text."""
    return [string for string in template.special_strings if not _is_one_token(string, tokenizer)]


def check_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that was made for another LLM.

    Raises:
        ModelError: the tokenizer does not know some special strings of the template.
    """
    if missing := special_strings_missing(template, tokenizer):
        raise ModelError(
            f'the template "{template.name}" does not belong to this LLM: {", ".join(missing)} would be '
            "plain text to its tokenizer; name the LLM's own template (language_model.template)"
        )


def _is_one_token(string: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = text_ids(tokenizer, string)
    return len(ids) == 1 and ids[0] != tokenizer.unk_token_id


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text by itself: no BOS or EOS is put around it."""
    return cast(Any, tokenizer).encode(text, add_special_tokens=False)


def spans(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """Return three spans a turn: what stands before the answer, the answer (supervised), the separator."""
    found: list[Span] = []
    for i, turn in enumerate(turns):
        asked = template.instruction.format(input=turn.question, round=i + 1)
        # XTuner begins a record, and every turn after an EOS, with BOS.
        found.append(Span(asked, supervised=False, bos=i == 0 or not template.suffix_as_eos))
        found.append(Span(turn.answer + template.suffix, supervised=True, eos=not template.suffix_as_eos))
        found.append(Span(template.sep, supervised=False))
    return found


def prompt(template: Template, history: Sequence[Turn], question: str) -> list[Span]:
    """Return the spans of a record up to where the answer to `question` begins."""
    return spans(template, [*history, Turn(question=question, answer="")])[:-2]
