"""Nothing outside the data and its picture folder is read, whatever the records say."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dianjing.check import records as records_module
from dianjing.check.check import Settings, check
from dianjing.check.convert import convert
from dianjing.errors import DataError
from tests.tiny import write_images

HOSTILE = {
    "../secret.png": "path_outside",
    "a/../../secret.png": "path_outside",
    "/etc/passwd": "path_absolute",
    "SECRET": "path_absolute",
    "file:///etc/passwd": "path_url",
    "http://127.0.0.1:1/a.png": "path_url",
    "https://169.254.169.254/latest": "path_url",
    "data:image/png;base64,AAAA": "path_url",
    "out.png": "path_outside",
    "away/secret.png": "path_outside",
    "a\0.png": "path_url",
    "..\\secret.png": "picture_missing",
    "~/secret.png": "picture_missing",
}

_seen: list[str] = []
_watching = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir", "socket.connect", "subprocess.Popen"):
        _seen.append(os.path.realpath(arguments[0]) if isinstance(arguments[0], str | bytes) else event)


sys.addaudithook(_note)


def opened_by(act: Callable[[], Any]) -> list[str]:
    """Return what is opened or listed while something is done, imports and Python's own files apart."""
    global _watching
    _seen.clear()
    _watching = True
    try:
        act()
    finally:
        _watching = False
    own = (sys.prefix, sys.base_prefix, str(Path(records_module.__file__).parents[2]), "/proc", "/sys")
    searched = {os.path.realpath(path or ".") for path in sys.path}
    return [path for path in map(os.fsdecode, _seen) if not path.startswith(own) and path not in searched]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    (tmp_path / "away").mkdir()
    for place in ("secret.png", "away/secret.png"):
        (tmp_path / place).write_bytes((tmp_path / "images/wide.png").read_bytes())
    (tmp_path / "images/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images/away").symlink_to(tmp_path / "away")
    return tmp_path


def names_of(folder: Path) -> dict[str, str]:
    return {name.replace("SECRET", str(folder / "secret.png")): code for name, code in HOSTILE.items()}


def test_nothing_outside_the_folder_is_opened(folder: Path) -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    names = names_of(folder)
    records = [{"id": name, "image": name, "conversations": conversation} for name in names]
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    settings = Settings(paths=(str(folder / "data.json"),), images=str(folder / "images"), workers=1)
    results = []
    opened = opened_by(lambda: results.append(check(settings, lambda *_: None)))
    found = results[0].findings
    assert {one.id: one.code for code in set(names.values()) for one in found.of(code)} == names
    allowed = (str(folder / "images"), str(folder / "data.json"))
    assert [path for path in opened if not path.startswith(allowed)] == []
    assert str(folder / "data.json") in opened, "the hook sees nothing"


def test_convert_reads_and_writes_nothing_outside(folder: Path) -> None:
    def message(name: str) -> list[dict[str, Any]]:
        picture = {"type": "image_url", "image_url": {"url": name}}
        question = {"role": "user", "content": [picture, {"type": "text", "text": "What?"}]}
        return [question, {"role": "assistant", "content": "A bus."}]

    records = [{"id": "../../x", "messages": message(name)} for name in ["wide.png", *names_of(folder)]]
    (folder / "chat.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "new").mkdir()
    results = []
    given = [str(folder / name) for name in ("chat.json", "new/o.json", "images")]
    opened = opened_by(lambda: results.append(convert(*given)))
    assert (results[0].records, len(results[0].left_out)) == (1, len(HOSTILE))
    allowed = tuple(str(folder / place) for place in ("images", "chat.json", "new"))
    assert [path for path in opened if not path.startswith(allowed)] == []
    written = [path.name for path in (folder / "new").rglob("*")]
    assert len(written) == 3
    assert not any("x" in Path(name).stem for name in written if name.endswith(".png"))


def test_a_huge_record_is_refused_without_being_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"id": "huge", "conversations": [{"from": "human", "value": "x" * 5000}, {"from": "gpt", "value": "y"}]}
    (folder / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({**record, "id": "h2"}), encoding="utf-8")
    monkeypatch.setattr(records_module, "MAX_RECORD_BYTES", 4000)
    monkeypatch.setattr(records_module, "read_value", lambda text: pytest.fail("it was parsed"))
    result = check(Settings(paths=(str(folder / "data.jsonl"),), workers=1), lambda *_: None)
    assert dict(result.findings.counts) == {"record_too_large": 2}


@pytest.mark.parametrize("name", ["no.json", "data.csv", "."])
def test_a_file_that_cannot_be_read(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read|must end in"):
        check(Settings(paths=(str(folder / name),), workers=1), lambda *_: None)


def test_several_processes_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dianjing.data import split as split_module

    monkeypatch.setattr(split_module, "CHUNK_RECORDS", 4)
    conversation = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": " "}]
    names = ["wide.png", "lost.png", "tall.jpg"] * 7
    records = [{"image": name, "conversations": conversation} for name in names]
    (folder / "data.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    found = []
    for workers in (1, 2):
        settings = Settings(paths=(str(folder / "data.json"),), images=str(folder / "images"), workers=workers)
        findings = check(settings, lambda *_: None).findings
        found.append([one for code in findings.codes() for one in findings.of(code)])
    assert found[0] == found[1]
    assert len(found[0]) > 20
