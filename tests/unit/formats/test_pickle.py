"""Checkpoints of torch are read as data, and only as data."""

from __future__ import annotations

import builtins
import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dianjing.errors import ModelError
from dianjing.formats.pickle import Inert, read_checkpoint
from tests.xtuner import XTUNER
from tests.xtuner_writer import ConfigDict, HistoryBuffer, LossScaler, ZeroStageEnum, fragment_address, installed

REAL = XTUNER / "tiny" / "finetune_iter_10.pth"


def same(ours: Any, theirs: Any) -> bool:
    """Compare two trees of plain data."""
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def tensors() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "a view": base[1:3, ::2],
        "its base": base,
        "transposed": base.t(),
        "expanded": torch.tensor([1.5]).expand(1),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        **{
            str(dtype): torch.tensor([0, 1, 2]).to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
        },
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    state = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    content = {
        **tensors(),
        "state": state,
        "ordered": collections.OrderedDict(a=1, b=(2.5, None, True, b"\xff", "\u00e9")),
        "numbers": [1, 300, 70_000, -5, 2**40, 2**80, 1e-3, float("inf")],
        "shape": torch.Size([2, 3]),
        "set": {1, 2},
        "nested": [[], {}, (), ((1, 2), (3,), (4, 5, 6, 7))],
    }
    path = tmp_path / "x.pth"
    torch.save(content, path, pickle_protocol=protocol)
    assert same(read_checkpoint(path), torch.load(path, weights_only=False))


def test_what_mmengine_and_deepspeed_add_is_inert(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with installed():
        content = {
            "history": HistoryBuffer([1.0, 2.0]),
            "config": ConfigDict(a=ConfigDict(b=1)),
            "scaler": LossScaler(),
            "stage": ZeroStageEnum.weights,
            "piece": fragment_address(3, 4),
            "scalars": [np.float64(0.5), np.float32(0.25), np.int64(7), np.bool_(True)],
            "array": np.arange(4),
            "dtype": torch.bfloat16,
        }
        torch.save(content, path)
    read = read_checkpoint(path)
    assert read["config"] == {"a": {"b": 1}}
    assert read["stage"] == 3
    assert read["scalars"] == [0.5, 0.25, 7, True]
    assert isinstance(read["history"], Inert)
    assert isinstance(read["piece"], Inert)
    assert read["piece"].state == {"numel": 3, "start": 4}


def test_a_real_checkpoint_of_xtuner_is_read_as_torch_reads_it_beside_stand_ins() -> None:
    names = [HistoryBuffer, np.dtype, np.ndarray, np.dtypes.Float64DType, np.dtypes.Int64DType]
    scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")  # type: ignore[attr-defined]
    rebuild = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")  # type: ignore[attr-defined]
    with installed(), torch.serialization.safe_globals([*names, scalar, rebuild, getattr]):
        oracle = torch.load(REAL, weights_only=True)
    read = read_checkpoint(REAL)
    for part in ("state_dict", "optimizer", "param_schedulers", "meta"):
        assert same(read[part], oracle[part]), part


class Payload:
    """Becomes a call of `function` when an unwary reader loads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write(path: Path, program: bytes) -> Path:
    """Write a torch file whose data.pkl is `program`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", b"\0" * 16)
    return path


def hostile(target: str) -> dict[str, Any]:
    return {
        "os.system": Payload(os.system, f"touch {target}"),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", target]),
        "eval": Payload(eval, f"open({target!r}, 'w')"),
        "exec": Payload(exec, f"open({target!r}, 'w')"),
        "open": Payload(open, target, "w"),
        "__import__": Payload(builtins.__import__, "os"),
        "torch.load": Payload(torch.load, target),
        "getattr": Payload(getattr, collections.OrderedDict, "fromkeys"),
        "getattr of a class we know": Payload(getattr, HistoryBuffer, "__init__"),
        "bytearray": Payload(bytearray, 2**40),
        "io.open": Payload(io.FileIO, target, "w"),
        "codec": Payload(__import__("_codecs").encode, "x", "zip_codec"),
    }


@pytest.mark.parametrize("kind", hostile("x"))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_checkpoint_is_refused_and_nothing_runs(tmp_path: Path, kind: str, protocol: int) -> None:
    target, path = tmp_path / "ran", tmp_path / "evil.pth"
    with installed():
        torch.save(
            {"state_dict": {"w": torch.zeros(2)}, "x": hostile(str(target))[kind]}, path, pickle_protocol=protocol
        )
    with pytest.raises(ModelError, match=r"evil\.pth: refused, nothing in it was run: it asks for"):
        read_checkpoint(path)
    assert not target.exists()


def test_a_hostile_checkpoint_would_run_in_pickle(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    pickle.loads(pickle.dumps(hostile(str(target))["os.system"]))
    assert target.exists(), "the payloads of these tests must work"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "os.system"),
        (b"\x80\x02cposix\nsystem\n.", "posix.system"),
        (b"ccollections\nOrderedDict\n}(S'a'\nK\x01ub.", "changes collections.OrderedDict"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R.", "getattr(str, 'system')"),
        (b"(S'x'\nios\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pwhatever\n.", "PERSID"),
        (b"S'x'\nQ.", "damaged"),
        (b"\x80\x02]K\x01K\x02s.", "as if it were a dict"),
        (b"\x80\x02K\x01)R.", "it calls a int"),
        (b"\x80\x02K\x01", "damaged"),
        (b"h\x05.", "damaged"),
        (b"t.", "damaged"),
    ],
)
def test_programs_that_are_no_data_are_refused(tmp_path: Path, program: bytes, complaint: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_checkpoint(write(tmp_path / "x.pth", program))
    assert complaint in str(caught.value)


def test_keys_that_would_take_for_ever_to_hash_are_refused(tmp_path: Path) -> None:
    program = b"\x80\x02)" + b"2\x86" * 80 + b"q\x00}h\x00K\x01s."  # a tuple of itself twice, 80 times over
    with pytest.raises(ModelError, match="a tuple as a key"):
        read_checkpoint(write(tmp_path / "x.pth", program))


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


DOUBLED = b"K\x01\x85" + b"2\x86" * 60
TENSOR_OF = b"ctorch._utils\n_rebuild_tensor_v2\n((%s%stQK\x00%s%s\x89NtR."
COLLIDING = b"".join(b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"N" for number in range(20_000))
STORAGE = text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
TENSOR_CALL = b"ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nOrderedDict\nNh\x00\x85NtR0"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        pytest.param(
            b"c__builtin__\ngetattr\n" + text("os") + DOUBLED + b"\x86R.", "a tuple as a key", id="doubled name"
        ),
        pytest.param(b"}(" + COLLIDING + b"u.", "that is too large", id="one hash for all"),
        pytest.param(b"}(" + (text("k" * 100_000) + b"N") * 2 + b"u.", "that is too large", id="long keys"),
        pytest.param(b"}G" + struct.pack(">d", 0.5) + b"Ns.", "a float as a key", id="number with a point"),
        pytest.param(
            b"}q\0(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(50_000)) + b"u0"
            b"](" + b"ccollections\nOrderedDict\nh\x00\x85R" * 5_000 + b"e.",
            "over and over",
            id="copies",
        ),
        pytest.param(
            b"}q\0("
            + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(50_000))
            + b"u0"
            + TENSOR_CALL,
            "by other means",
            id="copies within",
        ),
        pytest.param(b"c__builtin__\nset\n(" + b"N" * 1000 + b"tR.", "1,000 arguments", id="arguments"),
        pytest.param(
            TENSOR_OF
            % (STORAGE, b"K\x04", b"(" + (b"\x8a\x09" + (2**62).to_bytes(9, "little")) * 60_000 + b"t", b"(K\x01t"),
            "60,000 dimensions",
            id="dimensions",
        ),
        pytest.param(
            TENSOR_OF % (STORAGE, b"K\x04", b"(\x8a\xff" + b"\x7f" * 255 + b"t", b"(K\x01t"), "impossible", id="size"
        ),
        pytest.param(b"c" + b"a" * 2_000_000 + b"\nb\n.", "that is too large", id="name"),
        pytest.param(b"Fz" + b"z" * 2_000_000 + b"\n.", "2,000,", id="number"),
    ],
)
def test_a_small_program_that_would_take_for_ever_is_refused_in_few_words(
    tmp_path: Path, program: bytes, complaint: str
) -> None:
    path, begin = write(tmp_path / "x.pth", b"\x80\x02" + program), time.monotonic()
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - begin < 8


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n"
    b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ%stQJ%s(J%st(J%st\x89NtR."
)


@pytest.mark.parametrize(
    ("length", "offset", "size", "stride", "fine"),
    [
        (4, 0, 4, 1, True),
        (4, 1, 3, 1, True),
        (5, 0, 4, 1, False),  # the entry has four numbers
        (4, 1, 4, 1, False),
        (4, 0, 2, 4, False),
        (4, 0, 2**30, 0, False),  # one number, shown a billion times
        (4, -1, 2, 1, False),
        (4, 3, 2, -1, False),
    ],
)
def test_a_tensor_lies_within_its_storage(
    tmp_path: Path, length: int, offset: int, size: int, stride: int, fine: bool
) -> None:
    program = TENSOR % tuple(struct.pack("<i", number) for number in (length, offset, size, stride))
    path = write(tmp_path / "x.pth", program)
    if fine:
        assert read_checkpoint(path).tolist() == [0.0] * size
    else:
        with pytest.raises(ModelError, match="damaged"):
            read_checkpoint(path)


def test_a_file_cut_off_or_flipped_is_never_more_than_an_error(tmp_path: Path) -> None:
    whole, path = REAL.read_bytes(), tmp_path / "x.pth"
    generator = random.Random(0)
    for _ in range(40):
        path.write_bytes(whole[: generator.randrange(len(whole))])
        with pytest.raises(ModelError):
            read_checkpoint(path)
    for _ in range(100):
        torn = bytearray(whole)
        for _ in range(3):
            torn[generator.randrange(45_000)] = generator.randrange(256)  # in the program, mostly
        path.write_bytes(torn)
        with suppress(ModelError):  # any other is a fault of ours
            read_checkpoint(path)


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match="if it is older than that, save it with a torch of today"):
        read_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="damaged"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ModelError, match="compressed"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(ModelError, match=r"no data\.pkl"):
        read_checkpoint(path)
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(tmp_path / "gone.pth")


def test_a_zip_whose_entries_lie_beyond_its_end_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", b"\x80\x02}.")
    torn = bytearray(path.read_bytes())
    offset = torn.index(b"PK\x01\x02") + 42  # where the directory says that data.pkl begins
    torn[offset : offset + 4] = struct.pack("<I", 2**31)
    path.write_bytes(torn)
    with pytest.raises(ModelError, match="cannot be read"):
        read_checkpoint(path)


def test_nothing_of_the_checkpoints_programs_is_imported() -> None:
    code = f"""
import sys
from pathlib import Path
from dianjing.formats.pickle import read_checkpoint
assert "state_dict" in read_checkpoint(Path({str(REAL)!r}))
print([name for name in sys.modules if name.startswith(("mmengine", "deepspeed", "xtuner"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
