"""A record that can be read -> oddities of its texts, with the few numbers that the whole set needs of it."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from dianjing.check.codes import Finding
from dianjing.check.texts import ODD, Script, digest, excuse, loops, normalised, oddities, script, yes_or_no
from dianjing.check.tokens import Measured
from dianjing.constants import IMAGE_MARKER
from dianjing.data.marks import PATH_ALONE, UNMISTAKABLE, foreign_marks
from dianjing.data.record import Record, Turn

LONG_ANSWER = 24
"""Bytes of an answer from which on it is not a coincidence when another picture has it too."""
ECHO_BYTES = 12
SWITCH_CHARACTERS = 12
"""Question and answer are both longer than this when their languages are compared."""


@dataclass(kw_only=True)
class ChunkResult:
    """The contents of one chunk; arrays have one entry a record, unless they say otherwise."""

    findings: list[Finding] = field(default_factory=list[Finding])
    ids: list[str] = field(default_factory=list[str])
    lines: array[int] = field(default_factory=lambda: array("Q"))
    images: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    usable: list[bool] = field(default_factory=list[bool])
    """True if training can use the record as it is written, pictures apart."""
    content: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of pictures and texts; 0 for a record that cannot be read."""
    alike: array[int] = field(default_factory=lambda: array("Q"))
    """The same without capitals, spaces and punctuation."""
    answer: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of all answers of a record; 0 likewise."""
    long_answers: array[int] = field(default_factory=lambda: array("Q"))
    """Hash of each long answer to a picture; one entry an answer."""
    long_answers_of: array[int] = field(default_factory=lambda: array("Q"))
    """Number of the record it stands in."""
    measured: list[list[Measured]] = field(default_factory=list[list[Measured]])
    """None at all without a recipe."""
    values: defaultdict[str, list[str | int]] = field(default_factory=lambda: defaultdict(list))
    """Name of a distribution -> its values."""


@dataclass(frozen=True, slots=True)
class Where:
    """The record that findings are about."""

    file: str
    record: int
    id: str
    line: int

    def finding(self, code: str, text: str, field: str = "", *, fixed: bool = False) -> Finding:
        """Return a finding about it."""
        return Finding(
            code=code,
            file=self.file,
            text=text,
            record=self.record,
            id=self.id,
            line=self.line,
            field=field,
            fixed=fixed,
        )


def add_record(result: ChunkResult, where: Where, record: Record | None, special_strings: tuple[str, ...]) -> None:
    """Add what a record says to the result; None stands for one that cannot be read."""
    if record is None:
        for hashes in (result.content, result.alike, result.answer):
            hashes.append(0)
        return
    texts = [text for turn in record.turns for text in (turn.question, turn.answer)]
    whole = "\0".join(texts)
    latin = whole.isascii()
    alike = normalised(whole)
    said = alike.split(b"\0")
    if len(said) != len(texts):  # there is a \0 in one of them
        said = [normalised(text) for text in texts]
    pictures = "\0".join(record.images).encode() + b"\1"
    result.content.append(digest(pictures + whole.encode()))
    result.alike.append(digest(pictures + alike))
    result.answer.append(digest(b"\0".join(said[1::2])))
    _count(result.values, record, latin)
    odd = ODD.search(whole.replace(IMAGE_MARKER, "") if record.images else whole)
    for number, turn in enumerate(record.turns):
        question, answer = said[2 * number : 2 * number + 2]
        if record.images and len(answer) >= LONG_ANSWER:
            result.long_answers.append(digest(answer))
            result.long_answers_of.append(where.record)
        for code, text in _turn(turn, question, answer, latin):
            result.findings.append(where.finding(code, text, f"turn {number}"))
        if odd:
            for code, text in _odd(turn, bool(record.images)):
                result.findings.append(where.finding(code, text, f"turn {number}"))
        for mark in special_strings:
            if mark in turn.question or mark in turn.answer:
                text = f"{mark}, a mark of the chat template, stands in the text"
                result.findings.append(where.finding("special_string", text, f"turn {number}"))


def _count(values: dict[str, list[str | int]], record: Record, latin: bool) -> None:
    """Add a record to the distributions; `latin`: its texts are ASCII."""
    turns = record.turns
    values["turns"].append(len(turns))
    values["pictures"].append(len(record.images))
    values["question script"] += ["en" if latin else _question_script(turn) for turn in turns]
    values["answer script"] += ["en" if latin else script(turn.answer) for turn in turns]
    values["question characters"] += [len(turn.question) for turn in turns]
    values["answer characters"] += [len(turn.answer) for turn in turns]
    values["yes or no"] += [yes_or_no(turn.answer) for turn in turns]


def _question_script(turn: Turn) -> Script:
    return script(turn.question.replace(IMAGE_MARKER, ""))


def _turn(turn: Turn, question: bytes, answer: bytes, latin: bool) -> Iterator[tuple[str, str]]:
    """Yield what is odd about one turn: code and sentence; its texts are given without punctuation too."""
    if not latin:
        yield from _letters(turn)
    if IMAGE_MARKER in turn.answer:
        yield "marker_in_answer", f"{IMAGE_MARKER} stands in the answer"
    if words := excuse(turn.answer):
        yield "answer_refusal", f'the answer says "{words}"'
    if len(answer) >= ECHO_BYTES and question.removeprefix(b"<image>") == answer:
        yield "answer_echo", f'the answer is the question: "{turn.answer[:60]}"'
    for name, text in (("question", turn.question), ("answer", turn.answer)):
        if phrase := loops(text):
            yield "text_repeats", f'the {name} says "{phrase[:60]}" over and over'


def _odd(turn: Turn, pictures: bool) -> Iterator[tuple[str, str]]:
    """Yield what is odd about the characters of a turn: code and sentence."""
    question = turn.question.replace(IMAGE_MARKER, "").strip()
    mark = next(foreign_marks(question), None) if pictures else None
    if mark := mark or UNMISTAKABLE.search(question):
        yield "marker_as_text", f"{mark.group()} stands in the question as text"
    elif not pictures and (named := PATH_ALONE.search(question)):
        yield "picture_named", f"the question names {named.group().strip()[:60]}, and the record has no picture"
    yield from oddities("question", question)
    yield from oddities("answer", turn.answer)


def _letters(turn: Turn) -> Iterator[tuple[str, str]]:
    """Yield what only texts beyond ASCII can be."""
    scripts = _question_script(turn), script(turn.answer)
    lengths = len(turn.question), len(turn.answer)
    if scripts in (("zh", "en"), ("en", "zh")) and min(lengths) > SWITCH_CHARACTERS:
        yield "language_switch", f"the question is in {scripts[0]}, the answer in {scripts[1]}"
    for name, text in (("question", turn.question), ("answer", turn.answer)):
        if "\ufffd" in text:
            yield "text_broken", f"the {name} holds U+FFFD, where characters were lost"
