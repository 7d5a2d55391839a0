"""A JSON or JSONL file of any size -> the byte range of each record, without parsing it."""

from __future__ import annotations

import mmap
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dianjing.data.file_kind import LOOKED_AT, kind_of_file

MAX_RECORD_BYTES = 64 * 2**20
"""A longer record is not parsed: hardly a conversation, and perhaps meant to fill the memory."""
DEEPEST = 1000
"""Brackets within brackets; no reader of JSON goes further."""
MOST_TOKENS = 2**22
"""Brackets, commas and strings of a record of unusual depth."""
MOST_FLAWS = 1000
"""Between the records of a file; then no more of it is read."""
CHUNK_RECORDS = 512
CHUNK_BYTES = 2**20
CONVERSATIONS = ("conversations", "conversation", "messages")
"""Keys of a record under which its messages may stand."""
KEYS_SHOWN = 6
BOM = b"\xef\xbb\xbf"


Element = tuple[int, int]
"""One record of a file: its first byte, and the one after its last."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """A fault between the records of a file, with its byte."""

    code: str
    offset: int
    text: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records that are checked in one go."""

    first_record: int
    first_line: int
    """The line of `start`, from 1."""
    start: int
    elements: tuple[Element, ...]


# A whole value of the usual depth is one match; [^"...]++ and (?>...) keep it linear whatever is in it.
_STRING = rb'"(?>[^"\\]++|\\.)*+"'
_inside = rb'(?>[^"{}\[\]/]++|' + _STRING + rb")*+"
for _ in range(4):
    _inside = rb'(?>[^"{}\[\]/]++|' + _STRING + rb"|[{\[]" + _inside + rb"[}\]])*+"
_USUAL = re.compile(rb"[{\[]" + _inside + rb"[}\]]", re.DOTALL)
_TOKEN = re.compile(_STRING + rb"|//[^\n]*+|/\*.*?\*/|[\[\]{},]|\"", re.DOTALL)
_LIST_OF_OBJECTS = re.compile(rb"\[\s*+\{")
_MEMBER = re.compile(rb'[\s,]*+"((?>[^"\\]++|\\.)*+)"\s*+:\s*+', re.DOTALL)
_ONLY_CLOSED = re.compile(rb"[\s,]*+\}\s*+\Z")
_SPACE = re.compile(rb"[ \t\r\n]*+")
_COMMENT = re.compile(rb"//[^\n]*+|/\*.*?\*/", re.DOTALL)


@contextmanager
def mapped(path: str | int) -> Generator[mmap.mmap | bytes]:
    """Open a file, or one that is open (its number), as bytes that are read when they are looked at."""
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        if file.seek(0, 2) == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def split(data: mmap.mmap | bytes, *, lines: bool) -> Iterator[Element | Flaw]:
    """Yield the records of a JSONL file (`lines`) or of a JSON list, and what is wrong between them."""
    start = 0
    if data[:3] == BOM:
        yield Flaw("bom", 0, "the file begins with a byte order mark")
        start = 3
    if data[:2] == b"\0\0":
        yield Flaw("not_json", 0, "the file begins with zero bytes; copy or download it again")
    elif data[:2] in (b"\xff\xfe", b"\xfe\xff") or 0 in data[:2]:
        yield Flaw("encoding_known", 0, "the file is UTF-16, not UTF-8")
    elif kind := kind_of_file(data[start : start + LOOKED_AT]):
        yield Flaw("not_json", start, f"the file is {kind}")
    elif lines and not _is_list(data, start):
        yield from _lines(data, start)
    else:
        if lines:
            yield Flaw("json_list_in_lines", start, "one JSON list, where JSONL has one record a line; name it .json")
        yield from _elements(data, start)


def _is_list(data: mmap.mmap | bytes, start: int) -> bool:
    """Return whether a file is one JSON list of objects over all its lines."""
    start = _end_of(_SPACE, data, start)
    if not _LIST_OF_OBJECTS.match(data, start):
        return False
    end = _end(data, start)
    return end is None or _end_of(_SPACE, data, end) == len(data)


def _lines(data: mmap.mmap | bytes, start: int) -> Iterator[Element]:
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if end - start > MAX_RECORD_BYTES or data[start:end].strip():
            yield start, end
        start = end + 1


def _elements(data: mmap.mmap | bytes, start: int) -> Iterator[Element | Flaw]:
    position = yield from _skip(data, start)
    if position == len(data):
        return
    listed = data[position : position + 1] == b"["
    wrapping = None if listed else _wrapping(data, position)
    if wrapping and wrapping.start is None:
        yield Flaw("json_layout", position, f"an object that is not a record, {wrapping.keys}, not a list of records")
        return
    if wrapping and wrapping.start is not None:
        yield Flaw("json_wrapped", position, f'the list of records stands under "{wrapping.key}" of an object')
        listed, position = True, wrapping.start
    if not listed:
        yield Flaw("json_not_a_list", position, "it does not begin with [, as a list of records does")
    elif (position := (yield from _skip(data, position + 1))) < len(data) and data[position] == ord("]"):
        yield from _rest(data, position + 1)
        return
    while position < len(data):
        end = _end(data, position)
        if end is None:
            text = (
                "a record begins here that does not end: a bracket or a quote is missing, or it is nested too deeply "
                "or too large; what follows was not read"
            )
            yield Flaw("json_unread", position, text)
            return
        yield position, end
        comma = yield from _skip(data, end)
        follows = data[comma : comma + 1]
        if follows == b"]" and listed:
            yield from () if wrapping else _rest(data, comma + 1)
            return
        position = (yield from _skip(data, comma + 1)) if follows == b"," else comma
        if follows == b"," and data[position : position + 1] == b"]":
            yield Flaw("json_trailing_comma", comma, "a comma after the last record")
            yield from () if wrapping else _rest(data, position + 1)
            return
        if listed and follows != b",":
            what = "the list is not closed: ] is missing" if not follows else "a comma is missing between two records"
            yield Flaw("json_syntax", min(comma, len(data) - 1), what)
        if position == end:
            return


@dataclass(frozen=True, slots=True)
class Wrapping:
    """An object that a file consists of, and that is not a record itself."""

    keys: str
    """Its keys in words."""
    key: str = ""
    """That of the list that holds the records..."""
    start: int | None = None
    """...and the byte where this list begins; None when no list in it holds conversations."""


def _wrapping(data: mmap.mmap | bytes, start: int) -> Wrapping | None:
    """Return how the one object of a file holds records; None for a record, several objects, or a broken file."""
    keys: list[str] = []
    objects, lists = 0, False
    found: tuple[str, int] | None = None
    position = start + 1
    while data[start : start + 1] == b"{" and (member := _MEMBER.match(data, position)):
        key = member[1].decode(errors="replace")
        end = _end(data, member.end())
        if end is None or key in CONVERSATIONS:
            return None
        keys.append(key)
        objects += data[member.end() : member.end() + 1] == b"{"
        first = _LIST_OF_OBJECTS.match(data, member.end())
        lists = lists or bool(first)
        if first and not found and _holds_a_conversation(data, first.end() - 1):
            found = key, member.end()
        position = end
    if _ONLY_CLOSED.match(data, position) is None or not (lists or (objects == len(keys) > 1)):
        return None
    words = f"with the keys {', '.join(keys[:KEYS_SHOWN])}" + (", ..." if len(keys) > KEYS_SHOWN else "")
    return Wrapping(words, *found) if found else Wrapping(words)


def _holds_a_conversation(data: mmap.mmap | bytes, start: int) -> bool:
    """Return whether the object at `start` has a key under which conversations stand."""
    position = start + 1
    while member := _MEMBER.match(data, position):
        if member[1].decode(errors="replace") in CONVERSATIONS:
            return True
        end = _end(data, member.end())
        if end is None:
            return False
        position = end
    return False


def _skip(data: mmap.mmap | bytes, position: int) -> Generator[Flaw, None, int]:
    """Pass over blanks and comments; return what follows them."""
    while True:
        position = _end_of(_SPACE, data, position)
        comment = _COMMENT.match(data, position)
        if not comment:
            return position
        yield Flaw("json_comment", position, f"a comment: {_shown(comment.group())}")
        position = comment.end()


def _rest(data: mmap.mmap | bytes, position: int) -> Iterator[Flaw]:
    position = yield from _skip(data, position)
    if position < len(data):
        yield Flaw("json_unread", position, "something follows after the end of the list; it was not read")


def _end(data: mmap.mmap | bytes, start: int) -> int | None:
    """Return where the value ends that begins at `start`; None if it does not."""
    usual = _USUAL.match(data, start)
    if usual:
        return usual.end()
    depth = 0
    for number, token in enumerate(_TOKEN.finditer(data, start)):
        mark = token.group() if token.end() - token.start() == 1 else b""
        if mark == b'"':
            return None
        if mark and mark in b"]}," and depth == 0:
            return token.start()
        depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
        if depth == 0 and mark in (b"]", b"}"):
            return token.end()
        if depth > DEEPEST or number > MOST_TOKENS:
            return None
    return None if depth else len(data)


def _end_of(pattern: re.Pattern[bytes], data: mmap.mmap | bytes, position: int) -> int:
    found = pattern.match(data, position)
    return found.end() if found else position


def _shown(text: bytes) -> str:
    return text[:60].decode(errors="replace")


def chunks(data: mmap.mmap | bytes, *, lines: bool) -> Iterator[Chunk | tuple[Flaw, int, int]]:
    """Yield the records of a file in chunks, and each flaw between them with its line and column."""
    held: list[Element] = []
    record = size = position = 0
    line = 1
    flaws = _Flaws(data)
    for found in split(data, lines=lines):
        if isinstance(found, Flaw):
            yield flaws.placed(found)
            if flaws.number > MOST_FLAWS:
                text = f"more than {MOST_FLAWS:,} faults between the records; what follows was not read"
                yield flaws.placed(Flaw("json_unread", found.offset, text))
                break
            continue
        held.append(found)
        size += found[1] - found[0]
        if len(held) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield Chunk(record, line, position, tuple(held))
            line += _newlines(data, position, found[1])
            record, position, held, size = record + len(held), found[1], [], 0
    if held:
        yield Chunk(record, line, position, tuple(held))


class _Flaws:
    """Counts what is wrong between the records of a file, and the lines up to there, each line once."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._offset = self._begin = 0
        self._line = 1
        self.number = 0

    def placed(self, flaw: Flaw) -> tuple[Flaw, int, int]:
        """Return a flaw, behind all others so far, with its line and column."""
        self.number += 1
        self._line += _newlines(self._data, self._offset, flaw.offset)
        self._begin = max(self._begin, self._data.rfind(b"\n", self._offset, flaw.offset) + 1)
        self._offset = flaw.offset
        before = self._data[max(self._begin, flaw.offset - CHUNK_BYTES) : flaw.offset]
        column = len(before.decode(errors="replace")) + flaw.offset - self._begin - len(before) + 1
        return flaw, self._line, column


def _newlines(data: mmap.mmap | bytes, start: int, end: int) -> int:
    return sum(data[at : min(at + CHUNK_BYTES, end)].count(b"\n") for at in range(start, end, CHUNK_BYTES))
