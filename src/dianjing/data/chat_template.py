"""A tokenizer's own chat template (Jinja) -> the texts it puts around questions and answers, proved by rendering it."""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from dianjing.errors import ModelError, shortened

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedTokenizerBase  # slow to import

Message = tuple[str, str]
"""Role and text."""
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an answer is asked for -> text."""

QUESTIONS = ("first-question-qz", "second-question-qz", "third-question-qz")
ANSWERS = ("first-answer-qz", "second-answer-qz")
SYSTEM = "system-text-qz"
HARD_TEXTS = ("{x} 'a' \"b\" <b>&amp;</b> \\n \\", "你好，世界 😀", "several\n\nlines\tand  blanks", "word" * 500)
"""Texts that a template must leave as they are."""
STOPPED_CLOCK = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
"""Put before a template that writes today's date, since a prompt must be the same tomorrow; the date is the one that
Llama 3.1 and 3.2 have for readers without a clock."""
MOST_SECONDS = 5.0
MOST_MEMORY = 2**29
"""Bytes, beyond what the program has already."""
LONGEST_TEXT = 100_000
"""Characters that a template may write for a short conversation."""
THINKING = re.compile(r"<think>\s*</think>\s*")


class TurnsError(ModelError):
    """A chat template whose turns cannot be told apart soundly."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The texts that a chat template writes around questions and answers."""

    begin: str
    """Before the first turn, BOS and a system text included..."""
    front: str
    """...and without a system text that the template writes by itself."""
    before: str
    """Before each question."""
    after: str
    """Between a question and where the model begins to write."""
    lead: str
    """Blanks that the answer begins with."""
    rest: str
    """After an answer, up to `before` the next question."""
    ending: str
    """After the last answer."""
    trims_questions: bool
    trims_answers: bool
    parts: bool = False
    """Its messages are lists of texts and pictures, as those of LLaVAs on the hub are."""


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Return what the tokenizer's own chat template writes around turns.

    Raises:
        TurnsError: it has none, it cannot be rendered, or it does not treat all turns alike.
    """
    source = _source(tokenizer)
    specials = special_tokens(tokenizer)

    def read() -> Turns:
        render = _renderer(tokenizer, source)
        turns = _cut(render, specials)
        check_turns(turns, render)
        return replace(turns, parts=cast(Any, render).__name__ == "with_parts")

    return _in_limits(read)


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's chat template, of several the one named "default"."""
    found: Any = cast(Any, tokenizer).chat_template
    if not found:
        raise TurnsError("its tokenizer has no chat template")
    folder = cast(Any, tokenizer).name_or_path
    named = cast("dict[str, Any]", found) if isinstance(found, dict) else {"default": found}
    if "default" not in named:
        names = shortened(", ".join(f'"{name}"' for name in named))
        raise TurnsError(f'{folder}: none of the chat templates of its tokenizer is named "default", but {names}')
    if not isinstance(named["default"], str):
        kind = type(named["default"]).__name__
        raise TurnsError(f"{folder}: the chat template of its tokenizer is not text, but of type {kind}")
    return named["default"]


def _in_limits(read: Callable[[], Turns]) -> Turns:
    """Return what `read` returns, called in a child process that is ended: a template can loop and grow for ever.

    The child is a fork, since a new process would import transformers, for a second. It does nothing but render.

    Raises:
        TurnsError: as `read` raises it, or it takes too much time or memory.
    """
    from multiprocessing.connection import Pipe  # as jinja2 below, not for a list of templates

    receiving, sending = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads' locks; the child needs none
        child = os.fork()
    if child == 0:
        _answer(read, sending)
    sending.close()
    found: dict[str, Any] = {}
    try:
        found = json.loads(receiving.recv_bytes()) if receiving.poll(MOST_SECONDS) else {}
    except EOFError:
        pass
    finally:
        receiving.close()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not found:
        raise TurnsError(
            f"its chat template takes more than {MOST_SECONDS:g} s or {MOST_MEMORY:,} bytes of memory for a short "
            "conversation, and was stopped"
        )
    if "error" in found:
        raise TurnsError(found["error"])
    return Turns(**found)


def _answer(read: Callable[[], Turns], sending: Connection) -> NoReturn:
    """Send what `read` returns, or its error, and end this process, whatever happens."""
    try:
        gc.freeze()  # the parent's objects, on a GPU perhaps, are not this process's to end
        _limit_memory()
        try:
            found: dict[str, Any] = asdict(read())
        except TurnsError as error:
            found = {"error": shortened(error)}
        except Exception as error:  # a fault of ours; one of memory is said by saying nothing
            found = {} if isinstance(error, MemoryError) else {"error": shortened(f"{type(error).__name__}: {error}")}
        sending.send_bytes(json.dumps(found).encode())
    finally:
        os._exit(0)


def _limit_memory() -> None:
    """Limit this process to little more memory than it has; macOS knows no such limit, and there time must do."""
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokenizer's special tokens, longer ones first."""
    added = cast(Any, tokenizer).added_tokens_decoder.values()
    return sorted({str(token) for token in added if token.special}, key=lambda token: (-len(token), token))


def _renderer(tokenizer: PreTrainedTokenizerBase, source: str) -> Render:
    """Return a renderer in transformers' sandbox; a template for pictures wants its texts as content parts."""

    template = STOPPED_CLOCK + source if "strftime_now" in source else source

    from jinja2.exceptions import SecurityError

    def render(messages: Sequence[Message], asking: bool, *, parts: bool = False) -> str:
        said = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in messages
        ]
        try:
            text = str(
                cast(Any, tokenizer).apply_chat_template(
                    said, chat_template=template, add_generation_prompt=asking, tokenize=False
                )
            )
        except SecurityError as error:
            raise TurnsError(f"its chat template asks for what it may not have, and was stopped ({error})") from None
        except MemoryError:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            raise TurnsError(f"its chat template cannot be rendered ({type(error).__name__}: {error})") from None
        if len(text) > LONGEST_TEXT:
            raise TurnsError(f"its chat template writes {len(text):,} characters for a short conversation")
        return text

    def with_parts(messages: Sequence[Message], asking: bool) -> str:
        return render(messages, asking, parts=True)

    try:
        if QUESTIONS[0] in render([("user", QUESTIONS[0])], True):
            return render
    except TurnsError as error:
        if isinstance(error.__context__, SecurityError):
            raise
    return with_parts if QUESTIONS[0] in with_parts([("user", QUESTIONS[0])], True) else render


def _cut(render: Render, specials: Sequence[str]) -> Turns:
    """Return the texts between marked questions and answers."""
    said = [QUESTIONS[0], ANSWERS[0], QUESTIONS[1], ANSWERS[1], QUESTIONS[2]]
    head, *between, after = _pieces(render(_messages(said), True), said)
    (first_middle, second_middle), (first_gap, second_gap) = between[::2], between[1::2]
    if first_middle != second_middle or first_gap != second_gap:
        raise TurnsError("its chat template writes other texts around a later turn than around an earlier one")
    lead = first_middle.removeprefix(after)
    if not first_middle.startswith(after) or lead.strip():
        raise TurnsError(
            f"its chat template lets an answer begin after {after!r}, but writes {first_middle!r} before the answers "
            "of earlier turns (as templates that think do): what a record teaches would not be what is asked for later"
        )
    ending = _pieces(render(_messages(said[:2]), False), said[:2])[-1]
    # What also stands after the last answer ends a turn; a system text before the first question may end like one.
    ended = _shared_start(ending, first_gap, specials)
    before = _shared_end(head, first_gap.removeprefix(ended))
    questions, answers = (_trims(render, said, index) for index in (0, 1))
    begin = head.removesuffix(before)
    return Turns(
        begin=begin,
        front=_front(render, begin, before),
        before=before,
        after=after,
        lead=lead,
        rest=first_gap.removesuffix(before),
        ending=ending,
        trims_questions=questions,
        trims_answers=answers,
    )


def _front(render: Render, begin: str, before: str) -> str:
    """Return what begins a conversation, without the system text that stands there when none is given."""
    try:
        text = render([("system", SYSTEM), ("user", QUESTIONS[0])], True)
    except TurnsError:
        return begin  # it has no place for one
    head, found, rest = text.partition(SYSTEM)
    ends = rest.partition(before + QUESTIONS[0])[0]
    if not found or len(begin) < len(head + ends) or not (begin.startswith(head) and begin.endswith(ends)):
        return begin
    opening = before.replace("user", "system")
    return head.partition(opening)[0] if opening in head else ""


def _messages(said: Sequence[str]) -> list[Message]:
    return [("assistant" if index % 2 else "user", text) for index, text in enumerate(said)]


def _pieces(text: str, said: Sequence[str]) -> list[str]:
    """Return what stands before, between and after the messages."""
    pieces: list[str] = []
    for message in said:
        if text.count(message) != 1:
            raise TurnsError("its chat template does not write each message once, as it is and in order")
        piece, text = text.split(message)
        pieces.append(piece)
    return [*pieces, text]


def _shared_start(one: str, other: str, specials: Sequence[str]) -> str:
    """Return how both texts begin, in whole special tokens and whole texts between them."""
    cut = re.compile("(" + "|".join(map(re.escape, specials)) + ")") if specials else re.compile("(?!)")
    pairs = zip(cut.split(one), cut.split(other), strict=False)
    return "".join(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _shared_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-size - 1] == other[-size - 1]:
        size += 1
    return one[len(one) - size :]


def _trims(render: Render, said: Sequence[str], index: int) -> bool:
    """Return whether blanks around a message are taken away."""
    plain = render(_messages(said), True)
    blanks = f" \n{said[index]}\n "
    padded = render(_messages([*said[:index], blanks, *said[index + 1 :]]), True)
    if padded not in (plain, plain.replace(said[index], blanks)):
        raise TurnsError("its chat template rewrites messages that begin or end with blanks")
    return padded == plain


def check_turns(turns: Turns, render: Render) -> None:
    """Compare what `turns` says with what the template writes.

    Raises:
        TurnsError: they differ for some conversation, one that asks or one that ends.
    """
    for size in (1, 2, 3):
        for shift in range(len(HARD_TEXTS)):
            said = [HARD_TEXTS[(shift + index) % len(HARD_TEXTS)] for index in range(2 * size)]
            for end in range(1, 2 * size, 2):
                asked = turns.begin + body(turns, said[:end])
                if render(_messages(said[:end]), True) != asked:
                    raise TurnsError("its chat template changes messages, or earlier ones when later ones follow")
            whole = turns.begin + body(turns, said) + turns.ending
            written = render(_messages(said), False)
            if written != whole and THINKING.sub("", written) != whole:
                raise TurnsError("its chat template writes an answer otherwise when it is the last one")


def body(turns: Turns, said: Sequence[str]) -> str:
    """Return questions and answers, in turn, with what the template writes around them; the end is open."""
    text = ""
    for index, message in enumerate(said):
        if index % 2:
            text += turns.lead + (message.strip() if turns.trims_answers else message)
        else:
            question = message.strip() if turns.trims_questions else message
            text += (turns.rest if index else "") + turns.before + question + turns.after
    return text


def answer_ending(turns: Turns, specials: Sequence[str]) -> str:
    """Return what ends an answer, up to its first special token; "" where no special token does."""
    end = re.match(r".*?(?:" + "|".join(map(re.escape, specials)) + ")", turns.rest, re.DOTALL) if specials else None
    return end[0] if end and turns.ending.startswith(end[0]) else ""
