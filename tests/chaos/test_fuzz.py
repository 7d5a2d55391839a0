"""Two thousand damaged inputs: each is read, or refused with an error of ours; `make fuzz` reads a hundred thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import MEMORY_BYTES, Opened, Target, damaged, fuzz, peak_bytes, targets

KINDS = (
    "records",
    "record lines",
    "recipe",
    "picture",
    "dicom",
    "gguf",
    "pth",
    "foreign",
    "safetensors",
    "tokenizer",
    "tokenizer config",
    "config",
    "xtuner config",
    "reply",
    "request",
)
INPUTS = 134
NEEDS = {"dicom": "pydicom", "gguf": "gguf", "request": "starlette"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz").resolve()


@pytest.fixture(scope="module")
def kinds(folder: Path) -> dict[str, Target]:
    for package in NEEDS.values():
        pytest.importorskip(package)
    return targets(folder)


@pytest.fixture(scope="module")
def opened(folder: Path) -> Opened:
    return Opened(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_in_words(kind: str, kinds: dict[str, Target], folder: Path, opened: Opened) -> None:
    assert kinds.keys() == {*KINDS}
    before = peak_bytes()
    found = fuzz(kind, kinds[kind], INPUTS, folder, opened)
    assert not found.faults
    assert found.inputs == found.read + found.refused == INPUTS
    assert found.refused, "no input was damaged"
    assert not opened.outside
    assert peak_bytes() - before < MEMORY_BYTES


def test_a_traceback_a_hang_and_a_file_outside_are_seen(folder: Path, opened: Opened) -> None:
    def read(path: Path) -> None:
        Path("/etc/hostname").exists()
        with open("/etc/passwd", "rb"):
            raise TypeError("not ours")

    found = fuzz("bad", Target((b"seed",), read, "a", damaged), 3, folder, opened)
    assert sum(found.faults.values()) == 1 + 3  # the seed too
    assert opened.outside == ["/etc/passwd"] * 4
    opened.outside.clear()
