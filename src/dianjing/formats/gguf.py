"""The header of a GGUF file, read as data and proved before anything is allocated for what it promises."""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dianjing.errors import ModelError, shortened
from dianjing.extras import install

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
MOST_KEYS = 4096
MOST_TENSORS = 100_000
MOST_ELEMENTS = 2**22
"""Of all arrays in a header; the largest vocabularies, with scores, types and merges, have some 1.5 million."""
LONGEST_TEXT = 2**20
"""Bytes of a name, a token or a chat template."""
MOST_DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's types of a value -> struct's."""
TEXT, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class Header:
    """The part of the file before the numbers."""

    keys: dict[str, Any]
    """By name; None for a list."""
    tensors: dict[str, tuple[int, ...]]
    """Sizes by name, in torch's order."""
    types: dict[str, int]
    """Tensors by the name of their type."""


def is_gguf(path: str | Path) -> bool:
    """Return whether there is a file that is GGUF, by its first bytes or its name."""
    path = Path(path).expanduser()
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: Path) -> Header:
    """Return the keys and the sizes of a file, after proving that all it promises lies inside it.

    Raises:
        ModelError: it is cut, or what it says of itself cannot be.
    """
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ModelError(f"{path}: GGUF needs the package gguf: {install('gguf')}") from None
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content, {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}).read()
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        what = "it ends too early" if isinstance(error, struct.error) else shortened(error)
        raise ModelError(f"{path}: not a sound GGUF file: {what}; download it again") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Reader:
    """Reads a header from its first byte to its last; ValueError says what cannot be."""

    def __init__(self, content: mmap.mmap, types: dict[int, tuple[str, int, int]]) -> None:
        self.content, self.types = content, types
        self.place = 0
        self.elements = 0

    def read(self) -> Header:
        """Return the header."""
        if self.content[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.place = len(MAGIC)
        version, tensors, keys = self.number("I"), self.number("Q"), self.number("Q")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} can be read")
        if keys > MOST_KEYS or tensors > MOST_TENSORS:
            raise ValueError(f"it promises {keys:,} keys and {tensors:,} tensors, more than any model has")
        found: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if name in found:
                raise ValueError(f'the key "{shortened(name)}" is in it twice')
            found[name] = self.value(self.number("I"))
        architecture = found.get("general.architecture")
        if not isinstance(architecture, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", architecture):
            raise ValueError(f"general.architecture is {shortened(repr(architecture))}")
        return self.tensors(tensors, found)

    def tensors(self, count: int, keys: dict[str, Any]) -> Header:
        """Return the header, whose list of tensors begins here."""
        shapes: dict[str, tuple[int, ...]] = {}
        types: dict[str, int] = {}
        ends, held = 0, 0
        alignment = keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shortened(repr(alignment))}")
        for _ in range(count):
            name, dimensions = self.text(), self.number("I")
            if name in shapes:
                raise ValueError(f'the tensor "{shortened(name)}" is in it twice')
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise ValueError(f'the tensor "{shortened(name)}" has {dimensions:,} dimensions')
            shape = [self.number("Q") for _ in range(dimensions)]
            kind, offset = self.number("I"), self.number("Q")
            if kind not in self.types:
                raise ValueError(f'the tensor "{shortened(name)}" has type {kind}, which is not known')
            word, block, size = self.types[kind]
            if not all(shape) or shape[0] % block or offset % alignment:
                raise ValueError(f'the tensor "{shortened(name)}" is {shape} of {word} at {offset}, which cannot be')
            taken = math.prod(shape) // block * size
            shapes[name], types[word] = tuple(reversed(shape)), types.get(word, 0) + 1
            ends, held = max(ends, offset + taken), held + taken
        begin = -(-self.place // alignment) * alignment
        if begin + max(ends, held) > len(self.content):
            raise ValueError(f"its tensors take {begin + max(ends, held):,} bytes, and it has {len(self.content):,}")
        return Header(keys=keys, tensors=shapes, types=types)

    def number(self, kind: str) -> Any:
        """Return the number that is next."""
        (value,) = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        """Return the text that is next."""
        size = self.number("Q")
        if size > min(LONGEST_TEXT, len(self.content) - self.place):
            raise ValueError(f"a text in it is {size:,} bytes long")
        self.place += size
        return self.content[self.place - size : self.place].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return the value that is next; None for a list, which is passed over."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            if kind not in SCALARS:
                raise ValueError(f"a value in it has type {kind}, which is not known")
            return self.number(SCALARS[kind])
        inner, length = self.number("I"), self.number("Q")
        self.elements += length
        if self.elements > MOST_ELEMENTS:
            raise ValueError(f"its lists have over {MOST_ELEMENTS:,} elements")
        if inner == TEXT:
            for _ in range(length):
                self.text()
        elif inner in SCALARS:
            self.place += length * struct.calcsize(f"<{SCALARS[inner]}")
        else:
            raise ValueError(f"a list in it holds type {inner}, which is not known")
        if self.place > len(self.content):
            raise ValueError("it ends too early")
        return None
