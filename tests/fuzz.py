"""Inputs made from valid ones by damage -> our own errors, and nothing else: no traceback, no hang, no file outside.

python -m tests.fuzz 100000         that many inputs over all kinds (`make fuzz`)
python -m tests.fuzz 500 gguf       one kind
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from dianjing.config.load import load_recipe, save_recipe
from dianjing.data.encode import load_tokenizer
from dianjing.data.record import load_records
from dianjing.errors import DianjingError
from dianjing.formats.config import read_config
from dianjing.formats.gguf import read_header
from dianjing.formats.pickle import read_checkpoint
from dianjing.formats.python_config import read_python_config
from dianjing.formats.source import open_foreign
from dianjing.formats.xtuner_config import read_xtuner_config
from dianjing.make.replies import InvalidReply, read_pairs
from dianjing.pictures.picture import load_image
from dianjing.serve.chat_request import ContextWindow, safe_request
from dianjing.serve.guard import Refusal
from tests.gguf_files import write_gguf_llm
from tests.odd_dicoms import write_dicom
from tests.tiny import write_tokenizer
from tests.xtuner import XTUNER

SECONDS = 10
"""Of one input; more is a hang."""
MEMORY_BYTES = 1024 * 2**20
"""Memory that all inputs together may add to the process."""
EDGES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"{",
    b"}",
    b"[",
    b'"',
    b"../",
    b"/etc/passwd",
    b"\xff\xff\xff\xff",
    b"NaN",
    b"1e999",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "../../etc/passwd",
    "/etc/passwd",
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
)
OURS = (DianjingError, Refusal, InvalidReply)
GGUF_HEADER = 8_000
"""Bytes of the file in which its header lies; tensors follow."""


class Hang(BaseException):
    """An input that took longer than SECONDS; nothing that is read may catch it."""


@dataclass(frozen=True)
class Target:
    """A kind of input: valid ones, what reads them, and how they are damaged."""

    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    """Reads a file of the name."""
    name: str
    """Of the file."""
    damage: Callable[[random.Random, bytes], bytes]


def damaged(rng: random.Random, seed: bytes) -> bytes:
    """Return some bytes with a few of them flipped, cut out, repeated or replaced."""
    content = bytearray(seed)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                del content[at:end]
            case 2:
                content[at:at] = content[at:end] * rng.choice((1, 3, 50))
            case 3:
                content[at:end] = rng.randbytes(end - at)
            case 4:
                content[at:end] = rng.choice(EDGES)
            case _:
                del content[at if rng.random() < 0.3 else len(content) :]
    return bytes(content)


def changed(rng: random.Random, seed: bytes) -> bytes:
    """Return a JSON text with some values replaced, removed or nested; now and then plainly damaged."""
    if rng.random() < 0.25:
        return damaged(rng, seed)
    value = json.loads(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [*_places(value)]
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice((key.upper(), key + "s", ""))] = holder.pop(key)
            case 2:
                for _ in range(rng.choice((1, 3, 2000))):
                    holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in [*pairs] if depth < 50 else ():
        yield value, key
        yield from _places(inner, depth + 1)


def targets(folder: Path) -> dict[str, Target]:
    """Return all kinds of inputs; `folder` holds what is written to make them."""
    made = folder / "seeds"
    made.mkdir()
    trained = (XTUNER / "tiny" / "pretrain_iter_10.pth").read_bytes()
    config = read_checkpoint(XTUNER / "tiny" / "finetune_iter_10.pth")["meta"]["cfg"]
    record = {"id": "1", "image": "a.png", "conversations": _turns("<image>\nWhat?", "A cat."), "type": ["color"]}
    return {
        "records": Target((json.dumps([record, {**record, "id": "2"}]).encode(),), _records, "data.json", changed),
        "record lines": Target((json.dumps(record).encode() + b"\n",), _records, "data.jsonl", damaged),
        "recipe": Target((_recipe(made),), load_recipe, "recipe.toml", damaged),
        "picture": Target(tuple(_pictures()), _picture, "a.png", damaged),
        "dicom": Target((_dicom(made),), _picture, "a.dcm", damaged),
        "gguf": Target((write_gguf_llm(made / "a.gguf").read_bytes()[:GGUF_HEADER],), _gguf, "a.gguf", damaged),
        "pth": Target((_pth(made), trained), read_checkpoint, "a.pth", damaged),
        "foreign": Target((_pth(made), trained), _foreign, "a.pth", damaged),
        "safetensors": Target((_safetensors(made),), _foreign, "a.safetensors", damaged),
        "tokenizer": Target((_tokenizer(made, "tokenizer.json"),), _read_tokenizer, "tokenizer.json", changed),
        "tokenizer config": Target(
            (_tokenizer(made, "tokenizer_config.json"),), _read_tokenizer, "tokenizer_config.json", changed
        ),
        "config": Target(
            (json.dumps({"model_type": "llama", "hidden_size": 8}).encode(),), _config, "config.json", changed
        ),
        "xtuner config": Target((config.encode(),), _xtuner, "config.py", damaged),
        "reply": Target((_reply(), b"Here:\n```json\n" + _reply() + b"\n```"), _read_reply, "reply.txt", damaged),
        "request": Target((_request(),), _read_request, "request.json", changed),
    }


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _recipe(folder: Path) -> bytes:
    save_recipe(load_recipe("tinyworld_finetune"), folder / "recipe.toml")
    return (folder / "recipe.toml").read_bytes()


def _pictures() -> Iterator[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        file = io.BytesIO()
        image.save(file, kind)
        yield file.getvalue()


def _dicom(folder: Path) -> bytes:
    write_dicom(folder / "a.dcm", (109 * np.arange(600, dtype=np.uint16)).reshape(20, 30))
    return (folder / "a.dcm").read_bytes()


WEIGHTS = {
    "projector.model.0.weight": torch.ones(8, 4),
    "projector.model.0.bias": torch.ones(8),
    "projector.model.2.weight": torch.ones(8, 8),
    "projector.model.2.bias": torch.ones(8),
}


def _pth(folder: Path) -> bytes:
    torch.save({"state_dict": WEIGHTS, "meta": {"iter": 3}}, folder / "a.pth")
    return (folder / "a.pth").read_bytes()


def _safetensors(folder: Path) -> bytes:
    save_file(WEIGHTS, folder / "a.safetensors")
    return (folder / "a.safetensors").read_bytes()


def _tokenizer(folder: Path, name: str) -> bytes:
    write_tokenizer(folder / "tokenizer")
    return (folder / "tokenizer" / name).read_bytes()


def _reply() -> bytes:
    return json.dumps({"pairs": [{"question": "What is it?", "answer": "A cat."}] * 2}).encode()


def _request() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    url = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 5}).encode()


def _records(path: Path) -> None:
    load_records(str(path))


def _picture(path: Path) -> None:
    load_image(str(path.parent), path.name)


def _gguf(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 2**22)  # room for the tensors, whose numbers do not matter
    read_header(path)


def _foreign(path: Path) -> None:
    open_foreign(path)


def _read_tokenizer(path: Path) -> None:
    whole = path.parent.parent / "seeds" / "tokenizer"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name != path.name:
            (path.parent / name).write_bytes((whole / name).read_bytes())
    tokenizer = load_tokenizer(path.parent)
    tokenizer("What is it?", truncation=False)


def _config(path: Path) -> None:
    read_config(path.parent)


def _xtuner(path: Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    read_python_config(text, "config.py")
    read_xtuner_config(text, "config.py")


def _read_reply(path: Path) -> None:
    read_pairs(path.read_bytes().decode(errors="replace"))


class _Words:
    """A processor whose tokens are words."""

    def __init__(self) -> None:
        self.tokenizer = self

    def get_vocab(self) -> dict[str, int]:
        return {"0123456789": 0}

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        return " ".join(part.get("text", "") for message in messages for part in message["content"])

    def __call__(self, text: str, **settings: Any) -> Any:
        return SimpleNamespace(input_ids=text.split())


def _read_request(path: Path) -> None:
    safe_request(path.read_bytes(), "m", ContextWindow(positions=100, picture=4, processor=_Words()))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise Hang where the body takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Opened:
    """Files that the process opens and that are neither in a folder nor Python's own."""

    def __init__(self, folder: Path) -> None:
        python = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *filter(None, sys.path))
        folders = [f"{Path(place).resolve()}{os.sep}" for place in (folder, *python)]
        self._allowed = (*folders, "/proc/", "/sys/", "/dev/")
        self.outside: list[str] = []
        self.watching = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and self.watching and isinstance(given[0], str | bytes):
            path = os.path.realpath(os.fsdecode(given[0]))
            if not path.startswith(self._allowed):
                self.outside.append(path)


@dataclass
class Outcome:
    """Counts of one kind of input."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])


def fuzz(kind: str, target: Target, inputs: int, folder: Path, opened: Opened, seed: int = 0) -> Outcome:
    """Read the seeds, which must be read, then that many damaged inputs."""
    rng = random.Random(f"{seed} {kind}")
    outcome = Outcome()
    place, temporary = folder / "now", folder / "tmp"
    temporary.mkdir(exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    try:
        for content in target.seeds:
            if refused := _try(target, content, place, opened):
                outcome.faults[f"an undamaged one: {_words(refused)}"] += 1
        for _ in range(inputs):
            content = target.damage(rng, rng.choice(target.seeds))
            error = _try(target, content, place, opened)
            outcome.inputs += 1
            outcome.read += error is None
            outcome.refused += isinstance(error, OURS)
            if error and not isinstance(error, OURS):
                outcome.faults[_words(error)] += 1
                if keep := os.environ.get("FUZZ_KEEP"):
                    (Path(keep) / f"{kind}-{outcome.inputs}-{target.name}").write_bytes(content)
    finally:
        tempfile.tempdir = before
    return outcome


def _try(target: Target, content: bytes, place: Path, opened: Opened) -> BaseException | None:
    """Read an input; return the error."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / target.name).write_bytes(content)
    opened.watching = True
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(place / target.name)
    except (Exception, Hang) as error:
        return error
    finally:
        opened.watching = False
    return None


def _words(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:80]} ({Path(where.filename).name}:{where.lineno})"


def peak_bytes() -> int:
    """Return the most memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(inputs: int, only: str = "") -> int:
    """Print a table; return 1 if there was a fault."""
    failed = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        opened, kinds = Opened(folder), targets(folder)
        chosen = {kind: target for kind, target in kinds.items() if only in ("", kind)}
        before = peak_bytes()
        print("| kind | inputs | read | refused | faults | seconds |\n| --- | --- | --- | --- | --- | --- |")
        for kind, target in chosen.items():
            began = time.perf_counter()
            found = fuzz(kind, target, max(1, inputs // len(chosen)), folder, opened)
            faults = "; ".join(f"{words} x {count}" for words, count in found.faults.most_common(5)) or "0"
            seconds = time.perf_counter() - began
            print(
                f"| {kind} | {found.inputs} | {found.read} | {found.refused} | {faults} | {seconds:.0f} |", flush=True
            )
            failed |= bool(found.faults)
    grown = peak_bytes() - before
    outside = sorted(set(opened.outside))[:3]
    print(f"\nfiles opened outside: {len(opened.outside)} {outside}; memory grew by {grown >> 20} MiB")
    return int(failed or bool(opened.outside) or grown > MEMORY_BYTES)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
