"""Record -> text spans, each supervised or not, by the chat template of the LLM."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from dianjing.data.chat_template import Turns, TurnsError, answer_ending, body, read_turns, special_tokens
from dianjing.data.record import Turn
from dianjing.errors import ModelError
from dianjing.language import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow to import

OWN = "own"
"""Names the chat template that comes with the tokenizer."""
BEFORE, AFTER = 12, 24
"""Characters shown around the place where two templates begin to differ."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """How one LLM was taught to tell a question from an answer; fields and values are XTuner's."""

    name: str
    instruction: str
    """The text before an answer, with {input} for the question and maybe {round} for its number from 1."""
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
    joined: bool = False
    """The spans are tokenised as the one text they are, and that text has BOS where the template wants it."""
    begin: str = ""
    """Stands before the first question."""
    lead: str = ""
    """Begins an answer and is learned with it."""
    trims_questions: bool = False
    trims_answers: bool = False


@dataclass(frozen=True)
class Span:
    """A text that is tokenised on its own; `bos` begins and `eos` ends it with that token."""

    text: str
    supervised: bool
    """It is an answer."""
    learned: bool = True
    """Of an answer: its loss counts."""
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
        close = difflib.get_close_matches(name, (*TEMPLATES, OWN), n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ModelError(f'unknown template "{name}"; {hint}There are: {", ".join((*TEMPLATES, OWN))}')
    return TEMPLATES[name]


def own_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the tokenizer's own chat template, its answers learned up to the token that ends them.

    Raises:
        ModelError: there is none, or its answers cannot be separated.
    """
    try:
        return _own(tokenizer, read_turns(tokenizer))
    except TurnsError as error:
        raise ModelError(
            f'template "{OWN}" cannot be used: {error}; name another (language_model.template, or --template), '
            f"one of: {', '.join(TEMPLATES)}"
        ) from None


def _own(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Template:
    specials = special_tokens(tokenizer)
    end = answer_ending(turns, specials)
    if not end:
        raise TurnsError("its chat template writes no special token after an answer: no end would be learned")
    if re.search("[{}]", turns.before + turns.after):
        raise TurnsError("its chat template has braces around questions")
    instruction = f"{turns.before}{{input}}{turns.after}"
    return Template(
        name=OWN,
        instruction=instruction,
        suffix=end,
        suffix_as_eos=True,
        sep=turns.rest.removeprefix(end),
        stop_words=tuple(special for special in specials if end.endswith(special)),
        special_strings=tuple(special for special in specials if special in instruction + end),
        joined=True,
        begin=_bos_of_processor(tokenizer, turns) + turns.begin,
        lead=turns.lead,
        trims_questions=turns.trims_questions,
        trims_answers=turns.trims_answers,
    )


def template_for(tokenizer: PreTrainedTokenizerBase, name: str = "") -> tuple[Template, str]:
    """Return the template of a name ("own" is the tokenizer's), or without one the LLM's, and how it was chosen.

    Raises:
        ModelError: there is none of this name; or no template, or more than one, fits.
    """
    reason = say("as named")
    if not name:
        name, reason = _choose(tokenizer)
    elif name in TEMPLATES and cast(Any, tokenizer).chat_template:
        with suppress(TurnsError):  # what it writes is not known
            differs = difference(TEMPLATES[name], read_turns(tokenizer), tokenizer)
            reason += f"; {differs}" if differs else ""
    why = say("template: {name} ({reason})", name=name, reason=reason)
    return (own_template(tokenizer) if name == OWN else get_template(name)), why


def choose_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the template that the LLM was taught with: the one that its own chat template writes, and
    without one that whose special strings and stop words the tokenizer knows ("own" if none is like its own).

    Raises:
        ModelError: no template, or more than one, fits best.
    """
    return _choose(tokenizer)[0]


def _bos_of_processor(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> str:
    """Return the BOS that the processor of a LLaVA puts before what its template writes; "" where it puts none."""
    bos = str(tokenizer.bos_token or "")
    begins = turns.parts and bos and cast(Any, tokenizer)("a").input_ids[:1] == [tokenizer.bos_token_id]
    return bos if begins and not turns.begin.startswith(bos) else ""


def _choose(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    fits = _fitting(tokenizer)
    problem = ""
    if cast(Any, tokenizer).chat_template:
        try:
            return _like_its_own(tokenizer, read_turns(tokenizer), fits)
        except TurnsError as error:
            problem = str(error)
            # What it writes is unknown, but it must name the marks of the turns.
            fits = {name: known for name, known in fits.items() if _named_in(tokenizer, TEMPLATES[name])}
    best = [name for name, known in fits.items() if known == max(fits.values())]
    if len(best) != 1:
        found = f"more than one fits ({', '.join(best)})" if best else "its tokens are those of no known one"
        choice = (
            f", one of: {', '.join(best or TEMPLATES)}" if best or not problem else " if you know it, or another LLM"
        )
        raise ModelError(
            f"the chat template of this LLM is unclear: {'; '.join(filter(None, (found, problem)))}; name it "
            f"(language_model.template, or --template){choice}"
        )
    return best[0], say("chosen from the tokenizer") + (f"; {problem}" if problem else "")


def _like_its_own(tokenizer: PreTrainedTokenizerBase, turns: Turns, fits: Mapping[str, int]) -> tuple[str, str]:
    """Return the template that gives the ids of the tokenizer's own chat template, which may be that itself, and why.

    Raises:
        ModelError: none does, and its own cannot be learned.
        TurnsError: the same, and none is even like it.
    """
    bos = str(tokenizer.bos_token or "")
    alike = _alike(turns, bos)
    known = {name: fits.get(name, 0) for name in alike if name in fits or fits.keys().isdisjoint(alike)}
    differs = {name: difference(TEMPLATES[name], turns, tokenizer) for name in known}
    same = [name for name in known if not differs[name]]
    if same:
        return max(same, key=lambda name: known[name]), "chosen from the tokenizer, whose own gives the same ids"
    nearest = max(known, key=lambda name: known[name], default="")
    hint = f"{nearest} is like it, but {differs[nearest]}" if nearest else "no other is like it"
    try:
        _own(tokenizer, turns)
    except TurnsError as error:
        if not nearest:
            raise
        if turns.front.removeprefix(bos).strip():
            raise ModelError(
                f"the chat template of this LLM is like no known one: {hint}; nor can its own be used: {error}; choose "
                f"another LLM, or name {nearest} if that is meant (language_model.template, or --template)"
            ) from None
        return nearest, f"chosen from the tokenizer; {differs[nearest]}, and its own cannot be used: {error}"
    return OWN, f"the tokenizer's own chat template; {hint}"


def difference(template: Template, turns: Turns, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return in words where two turns of a template are other ids than those of the tokenizer's own; "" for nowhere.

    A system text that its own writes by itself counts on neither side, nor what follows the last answer's end.
    """
    said = [Turn(question="What colour is it?", answer="It is red."), Turn(question="And that?", answer="Blue.")]
    texts = [text for turn in said for text in (turn.question, turn.answer)]
    front = _bos_of_processor(tokenizer, turns) + turns.front
    own = front + body(turns, texts) + (answer_ending(turns, special_tokens(tokenizer)) or turns.ending)
    written, ids = "", list[int]()
    for span in spans(template, said)[:-1]:
        text = f"{(span.bos and tokenizer.bos_token) or ''}{span.text}{(span.eos and tokenizer.eos_token) or ''}"
        written += text
        ids += text_ids(tokenizer, text)
    if ids == text_ids(tokenizer, own):
        return ""
    at = next((i for i, (one, other) in enumerate(zip(written, own, strict=False)) if one != other), None)
    if at is None and len(written) == len(own):
        return "it splits the same text into other tokens"
    at = min(len(written), len(own)) if at is None else at
    here, there = (text[max(at - BEFORE, 0) : at + AFTER] for text in (written, own))
    return f"it writes {here!r} where the tokenizer's own writes {there!r}"


def _fitting(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the templates whose turns are marked by tokens of this tokenizer, and how many of those each has."""
    fits: dict[str, int] = {}
    for template in TEMPLATES.values():
        marks_turns = any(string in template.instruction for string in template.special_strings)
        strings = {*template.special_strings, *template.stop_words}
        if marks_turns and all(_is_one_token(string, tokenizer) for string in strings):
            fits[template.name] = len(strings)
    return fits


def _alike(turns: Turns, bos: str) -> list[str]:
    """Return the templates that write the same around a question, blanks aside."""

    def bare(text: str) -> str:
        return re.sub(r"\s+", "", text)

    repeats_bos = bool(bos) and turns.before.startswith(bos)
    own = bare(turns.before.removeprefix(bos) + "{input}" + turns.after)
    names = [template.name for template in TEMPLATES.values() if bare(template.instruction) == own]
    # Some of XTuner's templates are the same under several names.
    known = {"vicuna": True, "llama2_chat": repeats_bos, "mistral": not repeats_bos, "deepseek_coder": True}
    return [name for name in names if known.get(name)] or names


def _named_in(tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    return all(string in str(cast(Any, tokenizer).chat_template) for string in template.special_strings)


def special_strings_missing(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special strings of the template that the tokenizer would split into plain text."""
    return [string for string in template.special_strings if not _is_one_token(string, tokenizer)]


def doubts(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what speaks against a template being the LLM's own, a sentence each."""
    found: list[str] = []
    if missing := special_strings_missing(template, tokenizer):
        found.append(
            f'warning: the tokenizer reads {len(missing)} special strings of the template "{template.name}" as '
            f"plain text ({', '.join(missing)}): is it the LLM's own template?"
        )
    if not template.special_strings and not template.joined and (others := _fitting(tokenizer)):
        found.append(
            f'warning: the template "{template.name}" marks turns by plain text, but the tokenizer has the chat marks '
            f"of {', '.join(others)}: is it the LLM's own template?"
        )
    return found


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


def answer_end(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that a learned answer ends with; EOS where the template ends it with several or none."""
    if template.suffix_as_eos and _is_one_token(template.suffix, tokenizer):
        return template.suffix
    return str(tokenizer.eos_token or "")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text by itself: no BOS or EOS is put around it."""
    return cast(Any, tokenizer).encode(text, add_special_tokens=False)


def spans(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """Return three spans a turn: what stands before the answer, the answer (supervised), the separator."""
    found: list[Span] = []
    for i, turn in enumerate(turns):
        question = turn.question.strip() if template.trims_questions else turn.question
        answer = turn.answer.strip() if template.trims_answers else turn.answer
        asked = ("" if i else template.begin) + template.instruction.format(input=question, round=i + 1)
        # XTuner begins a record, and every turn after an EOS, with BOS.
        bos = not template.joined and (i == 0 or not template.suffix_as_eos)
        found.append(Span(asked, supervised=False, bos=bos))
        learned = template.lead + answer + template.suffix
        found.append(Span(learned, supervised=True, learned=turn.learned, eos=not template.suffix_as_eos))
        found.append(Span(template.sep, supervised=False))
    return found


def prompt(template: Template, history: Sequence[Turn], question: str) -> list[Span]:
    """Return the spans of a record up to where the answer to `question` begins."""
    return spans(template, [*history, Turn(question=question, answer="")])[:-2]
