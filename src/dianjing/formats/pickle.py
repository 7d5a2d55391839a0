"""A torch checkpoint (.pth, .bin, .pt) as plain data: its pickle is interpreted here, and nothing in it is ever called.

A pickle is a program for a stack machine. This machine knows no functions: a name in the program is looked up in
`CALLS`, a table of what checkpoints of torch, mmengine and DeepSpeed are made of, and any other name is refused.
Tensors are views of the file, mapped into memory, so that what is not looked at is not read.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dianjing.errors import ModelError, shortened

LARGEST_PROGRAM_BYTES = 512 * 2**20
"""Of a zip's data.pkl, which holds all but the tensors; a real one has a few MB."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of an entry of a zip: signature, then, after 22 bytes, the lengths of its name and of its extra field."""
LONGEST_KEY = 1000
"""Characters: longer ones, compared over and over, could take for ever."""
LARGEST_KEY = 2**32
"""Whole numbers from 2**61 on can be chosen so that all of them have one hash."""
MOST_DIMENSIONS = MOST_ARGUMENTS = 16
COPIED_PER_BYTE = 2
"""Items that calls may copy, per byte of the program; a real one makes once what it hands to a call, and copies 0.1."""
COPIED = (str, bytes, list, tuple, dict, set, frozenset)


@dataclass(frozen=True)
class Named:
    """A class or function that the program names: only its name."""

    name: str


@dataclass(eq=False)
class Inert:
    """Stand-in for an object of a class that is not needed."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class Refused(Exception):
    """The program asks for something that no checkpoint needs."""


def read_checkpoint(path: Path) -> Any:
    """Return what torch.save wrote: dicts, lists, tuples, numbers, texts, tensors, and `Inert` for the rest.

    Raises:
        ModelError: the file is damaged, is not a torch checkpoint, or asks for more than data.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        program, storages = _open_zip(path, mapped)
        return _Machine(storages).run(program)
    except Refused as refused:
        raise ModelError(
            f"{path}: refused, nothing in it was run: {shortened(refused)}; a checkpoint needs no such thing, so do "
            "not trust where the file comes from"
        ) from None
    except (OSError, zipfile.BadZipFile, struct.error) as error:
        raise ModelError(f"{path}: cannot be read: {shortened(error)}; a whole checkpoint of torch is needed") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {shortened(error)}"
        raise ModelError(f"{path}: damaged, or no checkpoint of torch ({reason}); copy it again") from None


def _open_zip(path: Path, mapped: mmap.mmap) -> tuple[bytes, Callable[[str], tuple[int, int, mmap.mmap]]]:
    """Return the program in a torch file, and a function from an entry's name to where its bytes are."""
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path}: not the zip file that torch writes since version 1.6: copy it again; if it is older "
            "than that, save it with a torch of today"
        )
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    programs = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(programs) != 1:
        raise zipfile.BadZipFile("there is no data.pkl in the zip")
    folder = programs[0].removesuffix("data.pkl")

    def place(name: str) -> tuple[int, int, mmap.mmap]:
        info = entries[f"{folder}{name}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelError(f"{path}: its entry {info.filename} is compressed, which torch does not do; save it again")
        signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(mapped, info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or start + info.file_size > len(mapped):
            raise zipfile.BadZipFile(f"the entry {info.filename} is cut off")
        return start, info.file_size, mapped

    if f"{folder}byteorder" in entries:
        start, size, _ = place("byteorder")
        if mapped[start : start + size] != b"little":
            raise ModelError(f"{path}: its numbers are in big-endian order; save it again on a little-endian machine")
    start, size, _ = place("data.pkl")
    if size > LARGEST_PROGRAM_BYTES:
        raise ModelError(
            f"{path}: its data.pkl has {size:,} bytes, more than {LARGEST_PROGRAM_BYTES:,}; it is not a checkpoint"
        )
    return mapped[start : start + size], place


DTYPES: dict[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
"""By the name of the storage's class."""

CLASSES = frozenset(
    {
        "builtins.dict",
        "builtins.object",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.ndarray",
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.device",
        "torch.storage.UntypedStorage",
        *(f"torch.{kind}Storage" for kind in DTYPES),
        *(f"torch.{str(dtype).removeprefix('torch.')}" for dtype in DTYPES.values()),
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "mmengine.config.config.ConfigDict",
    }
)
"""Classes that may be named; each object of them is an `Inert`."""

STATISTICS = ("min", "max", "mean", "current")
"""Attributes that a HistoryBuffer reads by getattr(HistoryBuffer, ...)."""


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Return a view of a storage, never of more than it holds."""
    if len(size) > MOST_DIMENSIONS or len(stride) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {len(size):,} dimensions, more than {MOST_DIMENSIONS}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *size, *stride)):
        raise ValueError("a tensor with an impossible size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if prod(size) > len(storage) or (prod(size) and last >= len(storage)):
        raise ValueError(f"a tensor of {'x'.join(map(str, size))} in a storage of {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _key(value: Any) -> Any:
    """Return what may be a key: hashing and comparing others can take for ever."""
    if not isinstance(value, str | int | bytes | None):
        raise Refused(f"it has a {type(value).__name__} as a key")
    size, most = (abs(value), LARGEST_KEY) if isinstance(value, int) else (len(value or ""), LONGEST_KEY)
    if size > most:
        raise Refused(f"it has a key or a name ({type(value).__name__}) that is too large")
    return value


def _rebuild_from_type(function: Named, _kind: Named, arguments: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, Named) or not function.name.startswith("torch._utils."):
        raise Refused("it makes a tensor by other means than torch's")
    return _call(function, arguments)


def _getattr(owner: Named, name: str) -> Inert:
    if _key(name) not in STATISTICS or owner != Named("mmengine.logging.history_buffer.HistoryBuffer"):
        raise Refused(f"it asks for getattr({getattr(owner, 'name', type(owner).__name__)}, {name!r})")
    return Inert(f"{owner.name}.{name}", ())


def _encode(text: str, encoding: str = "utf-8", *_: Any) -> bytes:
    if _key(encoding) not in ("latin1", "utf-8"):
        raise Refused(f"it asks for the text encoding {encoding!r}")
    return text.encode(encoding)


def _scalar(dtype: Inert, value: bytes) -> float | int | bool:
    """Return a number that numpy has pickled."""
    kind = _key(dtype.arguments[0])
    if kind not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1"):
        raise Refused(f"it asks for a numpy scalar of type {kind!r}")
    return np.frombuffer(value, dtype=f"<{kind}")[0].item()


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda _kind=None: {},
    "mmengine.config.config.ConfigDict": _dict,
    "builtins.set": lambda items=(): set(map(_key, items)),
    "builtins.frozenset": lambda items=(): frozenset(map(_key, items)),
    "builtins.bytes": lambda: b"",
    "builtins.getattr": _getattr,
    "copyreg._reconstructor": lambda kind, *_: _call(kind, ()),
    "_codecs.encode": _encode,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "numpy.dtype": lambda *arguments: Inert("numpy.dtype", arguments),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": lambda *_: Inert("numpy.ndarray", ()),
    "deepspeed.runtime.zero.config.ZeroStageEnum": lambda stage: stage,
}
"""Functions that a program may call -> what is called instead."""

MOVED = {"__builtin__.": "builtins.", "copy_reg.": "copyreg.", "numpy._core.": "numpy.core."}
"""Modules that other versions of Python and numpy name otherwise."""


def _call(named: Any, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) > MOST_ARGUMENTS:
        raise Refused(f"it makes a call with {len(arguments):,} arguments")
    if isinstance(named, Named) and named.name in CALLS:
        return CALLS[named.name](*arguments)
    if isinstance(named, Named) and named.name in CLASSES:
        return Inert(named.name, arguments)
    raise Refused(f"it calls {named.name if isinstance(named, Named) else f'a {type(named).__name__}'}")


def _named(module: Any, name: Any) -> Named:
    full = f"{_key(module)}.{_key(name)}"
    for old, new in MOVED.items():
        if full.startswith(old):
            full = new + full.removeprefix(old)
    if full not in CALLS and full not in CLASSES:
        raise Refused(f"it asks for {full}")
    return Named(full)


class _Machine:
    """The stack machine of pickle, for data only."""

    def __init__(self, place: Callable[[str], tuple[int, int, mmap.mmap]]) -> None:
        self._place = place
        self._storages: dict[str, Tensor] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._may_copy = 0

    def run(self, program: bytes) -> Any:
        """Return what the program leaves on the stack."""
        self._may_copy = COPIED_PER_BYTE * len(program)
        for opcode, given, _ in pickletools.genops(program):
            name, argument = opcode.name, cast(Any, given)
            if name in MADE:
                self._stack.append(MADE[name]())
            elif name in FILLED:
                self._stack.append(FILLED[name](self._since_mark()))
            elif name in LITERALS:
                self._stack.append(argument)
            elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                items = [self._stack.pop() for _ in range(int(name[-1]))]
                self._stack.append(tuple(reversed(items)))
            elif name == "GLOBAL":
                self._stack.append(_named(*argument.split(" ")))
            elif name == "STOP":
                return self._stack.pop()
            elif name not in ("PROTO", "FRAME"):
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise Refused(f"its pickle has the instruction {name}")
                step()
        raise ValueError("the pickle has no end")

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    _pop_mark = _since_mark

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop(self) -> None:
        self._stack.pop()

    def _dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _append(self) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def _appends(self) -> None:
        items = self._since_mark()
        self._top(list).extend(items)

    def _additems(self) -> None:
        items = self._since_mark()
        self._top(set).update(map(_key, items))

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._top(dict)[_key(key)] = value

    def _setitems(self) -> None:
        items = self._since_mark()
        self._top(dict).update(_dict(_pairs(items)))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_named(module, name))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._may_copy -= sum(len(item) for item in (arguments, *arguments) if isinstance(item, COPIED))
        if self._may_copy < 0:
            raise Refused("it copies the same things over and over")
        self._stack.append(_call(function, tuple(arguments)))

    _newobj = _reduce

    def _build(self) -> None:
        """Give an object its state: kept for an `Inert`; a dict's or a tensor's is of no use to us."""
        state = self._stack.pop()
        if isinstance(self._stack[-1], Inert):
            self._stack[-1].state = state
        elif isinstance(self._stack[-1], Named):
            raise Refused(f"it changes {self._stack[-1].name}")

    def _binpersid(self) -> None:
        """Put a storage on the stack: ("storage", its class, its entry in the zip, its device, its length)."""
        kind, storage_class, key, _device, length = self._stack.pop()
        if kind != "storage" or not isinstance(storage_class, Named):
            raise Refused("it asks for something outside the file")
        if _key(key) not in self._storages:
            dtype = DTYPES.get(storage_class.name.removeprefix("torch.").removesuffix("Storage"), torch.uint8)
            start, size, mapped = self._place(f"data/{key}")
            if type(length) is not int or length * dtype.itemsize != size:
                raise ValueError(f"storage {key} has {size} bytes, which are not its numbers of {dtype}")
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0)
            self._storages[key] = raw.view(dtype) if size else raw.to(dtype)
        self._stack.append(self._storages[key])

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise Refused(f"it changes a {type(self._stack[-1]).__name__} as if it were a {kind.__name__}")
        return self._stack[-1]


MADE: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set},
}
FILLED: dict[str, Callable[[list[Any]], Any]] = {
    **{"LIST": list, "TUPLE": tuple},
    "FROZENSET": lambda items: frozenset(map(_key, items)),
    "DICT": lambda items: _dict(_pairs(items)),
}
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
"""Instructions that put their own argument on the stack."""


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
